"""Loads cubins and starts kernels through the CUDA driver's C interface, on PyTorch's current stream.

The driver library comes with every GPU driver; nothing has to be installed. Arguments go by value as the packed structs
of `include/abi.h`, one pointer each, which is why the driver is called directly: `cuda.core` takes no structs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p

import torch

from .images import KERNELS, architecture_of, device_code, has_bulk_kernels

__all__ = ["CudaLauncher", "DriverError", "driver_version", "launcher_for", "load_driver"]

LEAST_CAPABILITY = (8, 0)  # bf16 and m16n8k16
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: the calling thread has not used the device so far
SHIPPED_CUDA = 13000  # the driver interface that shipped cubins need at least
UNIT_OF = {kernel: unit for unit, kernels in KERNELS.items() for kernel in kernels}


class DriverError(RuntimeError):
    """The CUDA driver is missing, too old, or refused a call."""


def load_driver(path: str = "libcuda.so.1") -> ctypes.CDLL:
    """Loads the driver library and declares the functions used here.

    Args:
        path: The library.

    Returns:
        The driver's library, its functions declared.

    Raises:
        DriverError: It is not there, or too old.
    """
    try:
        driver = ctypes.CDLL(path)
        handle, pointers = ctypes.POINTER(c_void_p), ctypes.POINTER(c_void_p)
        driver.cuDriverGetVersion.argtypes = [ctypes.POINTER(c_int)]
        driver.cuGetErrorString.argtypes = [c_int, ctypes.POINTER(c_char_p)]
        driver.cuLibraryLoadData.argtypes = [handle, c_char_p, *[c_void_p] * 2, c_uint, *[c_void_p] * 2, c_uint]
        driver.cuLibraryGetKernel.argtypes = [handle, c_void_p, c_char_p]
        driver.cuOccupancyMaxActiveBlocksPerMultiprocessor.argtypes = [ctypes.POINTER(c_int), c_void_p, c_int, c_size_t]
        driver.cuDeviceGet.argtypes = [ctypes.POINTER(c_int), c_int]
        driver.cuDevicePrimaryCtxRetain.argtypes = [handle, c_int]
        driver.cuCtxSetCurrent.argtypes = [c_void_p]
        driver.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, pointers, c_void_p]
        driver.cuLaunchCooperativeKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, pointers]
    except OSError as error:
        raise DriverError(f"the CUDA driver library {path} cannot be loaded: {error}") from error
    except AttributeError as error:
        raise DriverError(f"the CUDA driver is too old, CUDA 12 is needed: {error}") from error
    return driver


def driver_version() -> str:
    """The CUDA version that the driver offers, such as `"13.0"`.

    Raises:
        DriverError: There is no driver.
    """
    version = c_int()
    status = load_driver().cuDriverGetVersion(byref(version))
    if status:
        raise DriverError(f"cuDriverGetVersion failed ({status})")
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


class CudaLauncher:
    """A `Launcher` for one kind of GPU; see there for the attributes.

    Args:
        capability: Compute capability of the device.
        multiprocessors: How many it has.
        driver: What `load_driver` returned.
        bulk_copies: Whether decoding may use the kernels with bulk copies, where there are any for the device.

    Raises:
        DriverError: The device is too old, or the driver refuses the kernels.
        NvrtcError: The kernels have to be compiled here, and that did not work.
    """

    device_type = "cuda"

    def __init__(
        self, capability: tuple[int, int], multiprocessors: int, driver: ctypes.CDLL, bulk_copies: bool = True
    ) -> None:
        if capability < LEAST_CAPABILITY:
            got = ".".join(map(str, capability))
            raise DriverError(f"compute capability 8.0 (Ampere) or newer is needed, this device has {got}")
        version = c_int()
        self._driver = driver
        self._check(driver.cuDriverGetVersion(byref(version)), "cuDriverGetVersion")
        self._use_shipped = version.value >= SHIPPED_CUDA
        self._multiprocessors = multiprocessors
        self.arch = architecture_of(capability)
        self.name = f"cuda-{self.arch}"
        self.bulk_copies = bulk_copies and has_bulk_kernels(self.arch)
        self._kernels: dict[str, int] = {}
        self._resident: dict[str, int] = {}
        self.reason = self._load("storage")

    def _check(self, status: int, call: str) -> None:
        if status:
            text = c_char_p()
            self._driver.cuGetErrorString(status, byref(text))
            raise DriverError(f"{call} failed: {(text.value or b'unknown error').decode()} ({status})")

    def _load(self, unit: str) -> str:
        """Loads the kernels of a translation unit; returns where its device code is from."""
        code, origin = device_code(unit, self.arch, use_shipped=self._use_shipped)
        library = c_void_p()
        self._check(
            self._driver.cuLibraryLoadData(byref(library), code, None, None, 0, None, None, 0), "cuLibraryLoadData"
        )
        for name in KERNELS[unit]:
            kernel = c_void_p()
            self._check(self._driver.cuLibraryGetKernel(byref(kernel), library, name.encode()), "cuLibraryGetKernel")
            self._kernels[name] = kernel.value or 0
        return origin

    def launch(
        self,
        kernel: str,
        grid: int,
        block: int,
        arguments: tuple[ctypes._CData, ...],
        device: torch.device,
        cooperative: bool = False,
    ) -> None:
        """See `Launcher`.

        Raises:
            DriverError: It could not be started.
        """
        if grid == 0:
            return
        current = torch.cuda.current_device()
        index = current if device.index is None else device.index
        if index == current:
            self._start(kernel, grid, block, arguments, index, cooperative)
        else:
            with torch.cuda.device(index):  # the driver starts kernels in the current context
                self._start(kernel, grid, block, arguments, index, cooperative)

    def resident(self, kernel: str, block: int, device: torch.device) -> int:
        """See `Launcher`.

        Raises:
            DriverError: Not even one fits, or the driver could not be asked.
        """
        if kernel not in self._resident:
            current, each = torch.cuda.current_device(), c_int()
            index = current if device.index is None else device.index
            ask, handle = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor, self._handle(kernel)
            with contextlib.nullcontext() if index == current else torch.cuda.device(index):
                status = self._in_context(lambda: ask(byref(each), handle, block, 0), index)
            self._check(status, f"asking how many blocks of {kernel} fit")
            if each.value < 1:
                raise DriverError(f"a block of {kernel} with {block} threads does not fit on a multiprocessor")
            self._resident[kernel] = each.value * self._multiprocessors
        return self._resident[kernel]

    def _handle(self, kernel: str) -> int:
        if kernel not in self._kernels:
            self._load(UNIT_OF[kernel])
        return self._kernels[kernel]

    def _in_context(self, call: Callable[[], int], index: int) -> int:
        """Makes a call to the driver; a thread in which PyTorch did nothing yet is given the device's context first."""
        status = call()
        if status != NO_CONTEXT:
            return status
        number, context = c_int(), c_void_p()
        self._check(self._driver.cuDeviceGet(byref(number), index), "cuDeviceGet")
        self._check(self._driver.cuDevicePrimaryCtxRetain(byref(context), number), "cuDevicePrimaryCtxRetain")
        self._check(self._driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        return call()

    def capturing(self) -> bool:
        """See `Launcher`."""
        return torch.cuda.is_current_stream_capturing()

    def _start(
        self,
        kernel: str,
        grid: int,
        block: int,
        arguments: tuple[ctypes._CData, ...],
        index: int,
        cooperative: bool,
    ) -> None:
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = torch.cuda.current_stream(index).cuda_stream
        start = (self._handle(kernel), grid, 1, 1, block, 1, 1, 0, stream, pointers)
        if cooperative:
            status = self._in_context(lambda: self._driver.cuLaunchCooperativeKernel(*start), index)
        else:
            status = self._in_context(lambda: self._driver.cuLaunchKernel(*start, None), index)
        if status:
            self._check(status, f"starting {kernel} with {grid} blocks of {block} threads")


@functools.cache
def launcher_for(index: int, bulk_copies: bool = True) -> CudaLauncher:
    """The launcher for a CUDA device, made once.

    Args:
        index: Index of the device.
        bulk_copies: As in `CudaLauncher`.

    Returns:
        A launcher for kernels on that device.

    Raises:
        DriverError: As in `CudaLauncher`.
        NvrtcError: As in `CudaLauncher`.
    """
    properties = torch.cuda.get_device_properties(index)
    torch.cuda.init()  # makes the contexts that kernels run in
    capability = (properties.major, properties.minor)
    return CudaLauncher(capability, properties.multi_processor_count, load_driver(), bulk_copies)
