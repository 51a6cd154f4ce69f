"""Proof by trial: models, ways to place examples, moments, wrappers and measures, composed by a seed.

One promise is asked of every composition: the numbers of autograd, or a documented error, and a model left as it was.

How to add a member to an axis (one line each; all members of the other axes are composed with it at once):

* a body, raw inputs -> ``(n, 4)``:            ``BODIES["name"] = (make, draw)``             in ``bodies.py``
* a block, ``(..., 4) -> (..., 4)``:           ``BLOCKS["name"] = make``                     in ``blocks.py``
* a placing, ``f(block, h, key) -> (n, 4)``:   ``PLACINGS["name"] = f``                      in ``placings.py``
* a pool of ``values`` by their ``owner``:     ``POOLS["name"] = f``                         in ``pools.py``
* a moment, a generator of lists of batches:   ``MOMENTS["name"] = f``                       in ``moments.py``
* a wrapper, net -> what is measured:          ``WRAPPERS["name"] = f``                      in ``wrappers.py``
* a measure, returns what was got and wanted:  ``MEASURES["name"] = f``                      in ``measures.py``
* a noise (random or stateful forward pass):   ``NOISES["name"] = make``                     in ``noises.py``

``python tests/families --seeds 0:500`` runs a range of seeds and prints, for each failure, the shortest recipe that
still fails; ``--only placing=sort`` holds an axis fixed, ``--recipe "block=fused n=3"`` runs one.
"""
