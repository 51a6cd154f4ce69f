"""Progress bars, of terminals and notebooks; a notebook without widgets gets those of a terminal, without a word."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "IProgress not found")
    from tqdm.auto import tqdm as tqdm
