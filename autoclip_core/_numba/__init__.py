"""The Numba backend: the same tree, the same answers and the same snapshots where the compiled kernel is not built.

The only folder that imports numba. Its files:

- `compiler`: how functions are compiled, and where their code is kept;
- `tree`: nodes, tree and window, in compiled functions over numpy arrays;
- `history`: one history as an object: memory, locking, errors;
- `snapshot`: bytes in, bytes out;
- `check`: every invariant, one sentence each.
"""

from autoclip_core._numba.history import History

__all__ = ["History"]
