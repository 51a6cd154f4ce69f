"""Speed and memory of the library beside one forward and backward pass, and beside other libraries where installed.

``python -m benchmarks --workload W1 --job J1`` times one cell of the table; without options all of them.
"""
