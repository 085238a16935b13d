"""Arrays of numpy, and parquet."""

from __future__ import annotations

import lzma
import math
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO

from autoclip_core.errors import AutoClipValueError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from autoclip_core.logs.found import Found

_PART = 1 << 16


def read_array(stream: BinaryIO, name: str, found: Found) -> None:
    """Read a .npy file that is all there is: norms, or columns of them."""
    array = _load(stream, found)
    if stream.read(1):
        found.notes.append(f"{found.source} goes on after its array; the first is all that was read.")
    if array.dtype.names or (array.ndim == 2 and array.size not in array.shape):
        _take(array, "", found)
        return
    found.columns = found.columns or [name or "norm"]
    _take(array, name or "norm", found)


def read_archive(file: BinaryIO, found: Found) -> None:
    """Read the arrays of a .npz file; those that nobody asks for stay packed."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            names = [member.removesuffix(".npy") for member in members]
            if not names:
                raise AutoClipValueError(
                    f"{found.source} is a zip archive without arrays of numpy; unpack it, or save the norms as CSV."
                )
            if len(names) == 1:
                found.columns = found.columns or names
            for name, member in zip(names, members, strict=True):
                if found.under(name) or any(column.startswith(f"{name}.") for column in found.columns):
                    with archive.open(member) as stream:
                        _take(_load(stream, found), name, found)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
        raise AutoClipValueError(f"{found.source} is an archive that cannot be read: {error}.") from None


def _load(stream: Any, found: Found) -> NDArray[Any]:
    """Read an array as far as it goes, without believing its size."""
    import numpy as np

    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(stream)
    except Exception as error:  # noqa: BLE001 - numpy evaluates what stands there
        raise AutoClipValueError(f"{found.source} is not a .npy file of numbers: {error}.") from None
    if dtype.hasobject or dtype.subdtype or not dtype.itemsize:
        raise AutoClipValueError(f"{found.source} holds {'Python objects' if dtype.hasobject else dtype}, not norms.")
    if min(shape, default=0) < 0:
        raise AutoClipValueError(f"{found.source} is not a .npy file of numbers: its shape is {shape}.")
    size = math.prod(shape)
    data = bytearray()
    while part := stream.read(min(size * dtype.itemsize - len(data), _PART)):
        data += part
    array = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
    if len(array) < size:
        if not shape or (by_columns and size not in shape):
            raise AutoClipValueError(f"{found.source} is cut: it holds {len(array):,} of {size:,} numbers.")
        found.notes.append(f"{found.source} is cut: it holds {len(array):,} of {size:,} numbers.")
        row = max(1, math.prod(shape[1:]))
        shape = (len(array) // row, *shape[1:])
        array = array[: math.prod(shape)]
    return array.reshape(shape, order="F" if by_columns else "C")


def _take(array: NDArray[Any], name: str, found: Found) -> None:
    """Take in the norms of an array, or of each column, or of each field."""
    import numpy as np

    parts = {field: array[field] for field in array.dtype.names or ()}
    if not parts and array.ndim == 2 and array.size not in array.shape:
        parts = {str(at): column for at, column in enumerate(array.T)}
    for part, norms in parts.items():
        _take(norms, f"{name}.{part}" if name else part, found)
    if parts:
        found.named.pop(name, None)  # only its parts can be asked for
        return
    if not (series := found.under(name)):
        return
    if array.dtype.kind not in "fiu" or array.size not in array.shape:
        raise AutoClipValueError(f"{found.source} holds {array.dtype} of shape {array.shape}, not one norm per step.")
    with np.errstate(over="ignore"):
        series.norms = np.ascontiguousarray(array.reshape(-1), np.float64)


def read_parquet(file: BinaryIO, found: Found) -> None:
    """Read the columns that are asked for, by the first library that is there."""
    reason = ""
    for read in (_read_by_pyarrow, _read_by_pandas):
        try:
            read(file, found)
            return
        except ImportError as error:
            reason = str(error).partition("\n")[0]
        except AutoClipValueError:
            raise
        except Exception as error:  # noqa: BLE001 - each library and each of its engines has its own
            raise AutoClipValueError(f"{found.source} is parquet that cannot be read: {error}") from None
    raise AutoClipValueError(
        f"{found.source} is parquet, which takes pyarrow or pandas to read: pip install pyarrow ({reason})."
    )


def _read_by_pyarrow(file: BinaryIO, found: Found) -> None:
    from pyarrow import Table, parquet

    content = parquet.ParquetFile(file, page_checksum_verification=True)  # where there are any
    for at in range(len(content.schema)):
        found.under(content.schema.column(at).path)
    for name, series in found.chosen().items():
        for batch in content.iter_batches(columns=[name]):
            table = Table.from_batches([batch])
            while table.num_columns == 1 and str(table.schema.types[0]).startswith("struct"):  # a record in a record
                table = table.flatten()
            if str(table.schema.types[0]) == "bool":
                raise AutoClipValueError(f"{name!r} in {found.source} is true or false, not a norm.")
            norms = table.column(0).drop_null().cast("float64", safe=False)  # a large integer is rounded
            series.norms.frombytes(norms.to_numpy().tobytes())


def _read_by_pandas(file: BinaryIO, found: Found) -> None:
    import pandas as pd

    content = pd.read_parquet(file)
    columns = {str(name): content[name] for name in content.columns}
    for name in columns:
        found.under(name)
    for name, series in found.chosen().items():
        if columns[name].dtype == bool:
            raise AutoClipValueError(f"{name!r} in {found.source} is true or false, not a norm.")
        series.norms = columns[name].dropna().to_numpy("float64")
