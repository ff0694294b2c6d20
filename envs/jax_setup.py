"""JAX as this project uses it: fast to start, quiet, and modest with memory.

Two caches make a start fast. Reading and tracing a big program in python takes seconds, so `load`
keeps what comes out of it in JAX's portable form; and JAX itself keeps the machine code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynmoe.errors import UserError
from dynmoe.lab import cache

CPU_OPTIONS = {
    # fewer copies of what loops carry: a step of Craftax takes 30 % less time
    "xla_cpu_copy_insertion_use_region_analysis": True,
    # no library kernels for sums of two numbers: Craftax's worlds take 35 % less time
    "xla_cpu_experimental_ynn_fusion_type": "",
}
"""XLA's options for the CPU that pay; they change no bit of what Craftax computes"""
SETTINGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_prng_impl")
"""JAX's settings that change what a program computes"""
PACKAGES = ("jax", "jaxlib", "craftax", "flax")


class Program(NamedTuple):
    """A function to be compiled: what it takes, and whether the first argument's memory is free."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """trees of anything with a shape and a type"""
    donate: bool = False


class Loaded(NamedTuple):
    """Programs ready to run, by name, and the facts kept beside them."""

    run: dict[str, Callable[..., Any]]
    takes: dict[str, tuple[Any, ...]]
    """their arguments, as jax.ShapeDtypeStruct"""
    gives: dict[str, Any]
    """what they return, likewise"""
    facts: dict[str, Any]


@functools.cache
def prepare() -> Any:
    """The module jax, set up once per process: compiled programs are kept in the cache folder.

    What the user has set in JAX's own variables stays. Without a writable folder every process
    compiles again, which one line on stderr says.

    Raises:
        UserError: jax is not installed.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory as well
    try:
        jax = importlib.import_module("jax")
        importlib.import_module("jax.export")
        importlib.import_module("flatbuffers")  # jax.export wants it when it writes
    except ImportError as error:
        missing = error.name or "jax"
        raise UserError(f"Craftax needs {missing}; run: pip install {missing}") from None
    if jax.config.jax_compilation_cache_dir is None:
        folder = cache.folder() / "jax"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            cache.notice(f"cache: {folder} cannot be written ({error.strerror}); starts stay slow")
        else:
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return jax


def device(kind: str, index: int | None = None) -> Any:
    """The JAX device of that kind, "cpu" or "cuda".

    Raises:
        UserError: JAX does not have it.
    """
    jax = prepare()
    try:
        return jax.devices(kind)[index or 0]
    except (RuntimeError, IndexError):
        there = ", ".join(str(each) for each in jax.devices())
        hint = "; for CUDA run: pip install 'jax[cuda13]'" if kind == "cuda" else ""
        raise UserError(f"JAX has no device {kind}:{index or 0}, only {there}{hint}") from None


def has(kind: str, index: int = 0) -> bool:
    """Whether JAX has that device."""
    with contextlib.suppress(UserError):
        return bool(device(kind, index))
    return False


def load(
    name: str, sources: list[str], place: Any, build: Callable[[], tuple[dict[str, Program], Any]]
) -> Loaded:
    """Compiled programs, by way of both caches.

    Args:
        name: of the file, and for the notice; must tell programs of the same sources apart.
        sources: modules whose change makes the kept programs stale.
        place: JAX device to run on.
        build: makes the programs by name and facts that JSON can hold; called if none are kept.
    """
    jax = prepare()
    kind = "cpu" if place.platform == "cpu" else "cuda"

    def make() -> cache.Arrays:
        programs, facts = build()
        arrays = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        for key, program in programs.items():
            jitted = jax.jit(program.function)
            portable = jax.export.export(jitted, platforms=[kind])(*program.arguments)
            arrays[f"{key} {program.donate:d}"] = np.frombuffer(portable.serialize(), np.uint8)
        return arrays

    file = f"{name.replace(' ', '-').lower()}-{kind}-{_digest(sources)}"
    known = (cache.folder() / f"{file}.npz").is_file()
    loaded = Loaded({}, {}, {}, {})
    with _telling(f"compiling {name}", first_s=10.0 if known else 2.0), quiet():
        arrays = cache.load_or_make(file, make)
        loaded.facts.update(json.loads(arrays.pop("facts").tobytes()))
        for label, data in arrays.items():
            key, donate = label.split()
            portable = jax.export.deserialize(bytearray(data))
            on = jax.sharding.SingleDeviceSharding(place)
            takes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on) for a in portable.in_avals]
            arguments, _ = jax.tree.unflatten(portable.in_tree, takes)
            jitted = jax.jit(
                portable.call,
                donate_argnums=(0,) if donate == "1" else (),
                compiler_options=_options(kind),
            )
            loaded.run[key] = jitted.lower(*arguments).compile()
            loaded.takes[key] = arguments
            loaded.gives[key] = jax.tree.unflatten(portable.out_tree, portable.out_avals)
    return loaded


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing goes to stdout: craftax prints while it loads."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _digest(sources: list[str]) -> str:
    """Of everything that decides what comes out of tracing."""
    config = prepare().config
    texts = [Path(str(importlib.import_module(s).__file__)).read_bytes() for s in sources]
    return cache.digest(
        {
            "sources": [hashlib.sha256(text).hexdigest() for text in texts],
            "versions": [metadata.version(package) for package in PACKAGES],
            "settings": [getattr(config, setting, None) for setting in SETTINGS],
        }
    )


@functools.cache
def _options(kind: str) -> dict[str, Any] | None:
    """Compiler options for a kind of device; those that this version of XLA lacks are left out."""
    if kind != "cpu":
        return None
    jax, found = prepare(), {}
    for name, value in CPU_OPTIONS.items():
        with contextlib.suppress(Exception):  # the type of the error changes between versions
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
            found[name] = value
    return found


@contextlib.contextmanager
def _telling(what: str, first_s: float, every_s: float = 10.0) -> Iterator[None]:
    """Say on stderr what is going on, should it take longer than `first_s` seconds."""
    done, began = threading.Event(), time.monotonic()
    cached = prepare().config.jax_compilation_cache_dir is not None
    later = "; later starts take seconds" if cached else ""

    def tell() -> None:
        wait = first_s
        while not done.wait(wait):
            seconds = time.monotonic() - began
            print(f"{what}, {seconds:.0f} s so far{later}", file=sys.stderr, flush=True)
            wait = every_s

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
