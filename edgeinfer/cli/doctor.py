"""`edgeinfer doctor`: the machine, what can run on it, and what is stored."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeinfer.cli import options
from edgeinfer.cli.output import emit, emit_json


def doctor(json_output: options.JsonOutput = False, debug: options.Debug = False) -> None:
    """Show the machine, the backends, the models, the config file."""
    findings = examine()
    if json_output:
        emit_json(findings)
    else:
        emit(render(findings))


def examine() -> dict[str, Any]:
    """Everything doctor knows, as JSON values. Never raises for a backend that is broken."""
    from edgeinfer import __version__
    from edgeinfer.backend_choice import AUTOMATIC
    from edgeinfer.config import ConfigInvalid, config_path, read_config
    from edgeinfer.errors import EdgeInferError
    from edgeinfer.machine.gpus import find_gpus, gpu_finding, missing_gpus
    from edgeinfer.machine.pressure import read_pressure
    from edgeinfer.machine.probe import default_threads, probe_machine
    from edgeinfer.registry import backend_names, get_backend
    from edgeinfer_models.store import data_folder, list_models

    config: dict[str, Any] = {"path": str(config_path()), "found": False, "error": None}
    try:
        config["found"] = read_config().found
    except ConfigInvalid as error:
        config["error"] = str(error)
    machine = probe_machine()
    pressure = read_pressure()
    decode, prefill = default_threads()
    backends: list[dict[str, Any]] = []
    for name in backend_names():
        if name == "scripted":  # for tests; nothing a user would run
            continue
        try:
            probe = get_backend(name).probe()
        except EdgeInferError as error:
            backends.append({"name": name, "usable": False, "reason": str(error)})
            continue
        backends.append(
            {
                "name": name,
                "usable": probe.usable,
                "reason": probe.reason,
                "version": probe.version,
                "build": probe.build,
                "devices": [
                    {
                        "name": device.name,
                        "kind": device.kind,
                        "total_bytes": device.total_bytes,
                        "free_bytes": device.free_bytes,
                    }
                    for device in probe.devices
                ],
            }
        )
    gpus = find_gpus()
    in_use = tuple(
        device["name"]
        for backend in backends
        if backend["name"] in AUTOMATIC  # another may use it, but nobody's model gets there unasked
        for device in backend.get("devices", ())
        if device["kind"] == "gpu"
    )
    return {
        "machine": {
            "system": machine.system,
            "processor": machine.processor,
            "physical_cores": machine.physical_cores,
            "logical_cores": machine.logical_cores,
            "total_bytes": machine.total_bytes,
            "available_bytes": machine.available_bytes,
            "pressure": {**asdict(pressure), "is_high": pressure.is_high},
            "threads": {"decode": decode, "prefill": prefill},
            "gpus": [gpu.name for gpu in gpus],
        },
        "findings": [
            *(gpu_finding(gpu) for gpu in missing_gpus(gpus, in_use)),
            *([f"memory is short: {pressure}; a model may be slow, or not fit"] * pressure.is_high),
        ],
        "backends": backends,
        "config": config,
        "cache": _cache(),
        "kv_cache": _kv_cache(),
        "models": {
            "folder": str(data_folder()),
            "installed": [model.name for model in list_models().models],
        },
        "versions": {"edgeinfer": __version__, "python": sys.version.split()[0], **_versions()},
    }


def _cache() -> dict[str, Any]:
    from edgeinfer.engine.disk_cache import prompts_folder, stored_blocks

    folder = prompts_folder()
    blocks = stored_blocks(folder)
    size = sum(block.num_bytes for block in blocks)
    return {"folder": str(folder), "blocks": len(blocks), "bytes": size}


def _kv_cache() -> dict[str, Any] | None:
    """Of the model that is opened when none is named: what a token takes, and what `--kv-type auto` is
    for it; auto null: not measured yet."""
    from edgeinfer.engine.kv_choice import FULL, GOOD_TYPES, in_order, known_kv_speeds
    from edgeinfer.errors import EdgeInferError
    from edgeinfer.open import OpenOptions, plan_open
    from edgeinfer.registry import get_backend

    try:
        command = plan_open(OpenOptions()).command
        backend = get_backend(command.backend)
        if command.config is None:
            return None
        folder = Path(command.costs_folder)
        speeds = known_kv_speeds(backend, command.config, command.settings, folder)
    except EdgeInferError:
        return None
    return {
        "model": command.files.name,
        "bytes_per_token": {
            kind: command.config.kv_bytes_per_token(kind, kind) for kind in (FULL, *GOOD_TYPES)
        },
        "speed": {kind: asdict(speed) for kind, speed in speeds.items()},
        "auto": in_order(speeds)[0] if speeds else None,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in (
        "llama-cpp-python",
        "gguf",
        "huggingface_hub",
        "numpy",
        "textual",
        "jinja2",
        "typer",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def build_features(build: str) -> list[str]:
    """The switches that are on in "… | AVX2 = 1 | LLAMAFILE = 1 | …", as llama.cpp describes itself."""
    pairs = (part.rpartition(":")[2].partition("=") for part in build.split("|"))
    return [name.strip() for name, equals, value in pairs if equals and value.strip() not in ("0", "")]


def _kv_lines(kv: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{kind} {size:,}" for kind, size in kv["bytes_per_token"].items())
    lines = [f"KV cache   bytes a token of {kv['model']}: {sizes}"]
    for kind, speed in kv["speed"].items():
        lines.append(
            f"           {kind} against f16 at 2,048 tokens, estimated from measurements: answers"
            f" {speed['decode']:.2f} x as fast, reads prompts {speed['prefill']:.2f} x"
        )
    if kv["auto"]:
        lines.append(f"           --kv-type auto: {kv['auto']}, as far as memory allows")
    return lines


def _pressure(found: dict[str, Any]) -> str:
    from edgeinfer.machine.pressure import MemoryPressure

    values = {name: value for name, value in found.items() if name != "is_high"}
    text = str(MemoryPressure(**values))
    return text and f"; {text}"


def render(findings: dict[str, Any]) -> str:
    machine = findings["machine"]
    gib = 2**30
    lines = [
        f"machine    {machine['processor']}, {machine['physical_cores']} cores"
        f" ({machine['logical_cores']} threads), {machine['system']}",
        f"memory     {machine['available_bytes'] / gib:.1f} GiB free"
        f" of {machine['total_bytes'] / gib:.1f} GiB{_pressure(machine['pressure'])}",
        f"threads    {machine['threads']['decode']} to answer,"
        f" {machine['threads']['prefill']} to read prompts, until measured",
    ]
    lines += [f"finding    {finding}" for finding in findings["findings"]]
    for backend in findings["backends"]:
        if backend["usable"]:
            devices = ", ".join(f"{d['name']} ({d['kind']})" for d in backend["devices"])
            lines.append(f"backend    {backend['name']} {backend['version']}: usable; {devices}")
            if features := build_features(backend["build"]):
                lines.append(f"           built with {', '.join(features)}")
        else:
            lines.append(f"backend    {backend['name']}: not usable: {backend['reason']}")
    models = findings["models"]
    installed = ", ".join(models["installed"]) or "none; `edgeinfer models pull smollm2` gets one"
    lines.append(f"models     {installed}")
    lines.append(f"           in {models['folder']}")
    cache = findings["cache"]
    lines.append(
        f"cache      {cache['bytes'] / 2**20:.0f} MiB of conversations (`edgeinfer cache list`)"
    )
    lines.append(f"           in {cache['folder']}")
    if kv := findings["kv_cache"]:
        lines += _kv_lines(kv)
    config = findings["config"]
    state = config["error"] or f"{config['path']} ({'read' if config['found'] else 'none there'})"
    lines.append(f"config     {state}")
    versions = ", ".join(f"{name} {version}" for name, version in findings["versions"].items())
    lines.append(f"versions   {versions}")
    return "\n".join(lines) + "\n"
