"""llama.cpp through the ctypes layer of llama-cpp-python: CPU, CUDA, Vulkan, Metal, as built."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.backend import (
    Backend,
    Device,
    KvSpeed,
    MemoryItem,
    Probe,
    Progress,
    RowQuantizer,
    Runtime,
    RuntimeSettings,
)
from edgeinfer.errors import BackendUnavailable, LoadFailed
from edgeinfer_models.model_files import ModelFiles

if TYPE_CHECKING:
    from edgeinfer_models.config import ModelConfig
    from edgeinfer_models.token_rows import TokenRows


log = logging.getLogger("edgeinfer.llamacpp")


class LlamaCppBackend(Backend):
    name = "llamacpp"
    formats = ("gguf",)
    runs_exits = True

    def probe(self) -> Probe:
        from edgeinfer_backends.llamacpp import library

        if not library.is_installed():
            return Probe(False, "llama-cpp-python is not installed; run `make setup`")
        try:
            return Probe(
                usable=True,
                version=library.version(),
                build=library.build_description(),
                devices=library.devices(),
            )
        except (BackendUnavailable, OSError) as error:
            return Probe(False, str(error), version=library.version())

    def row_quantizer(self, threads: int = 0) -> RowQuantizer:
        from edgeinfer_backends.llamacpp.row_quantizer import GgmlRows

        return GgmlRows(threads)

    def predict_memory(
        self,
        files: ModelFiles,
        config: ModelConfig | None,
        settings: RuntimeSettings,
        devices: Sequence[Device] = (),
    ) -> list[MemoryItem]:
        from edgeinfer_backends.llamacpp.prediction import predict_memory

        if config is None:
            raise ValueError("llama.cpp's memory is worked out from a model's configuration")
        return predict_memory(files.weight_types, config, settings, devices)

    def measure_kv_speed(
        self, config: ModelConfig, settings: RuntimeSettings, kv_type: str
    ) -> KvSpeed | None:
        from edgeinfer_backends.llamacpp.attention_speed import measure_kv_speed

        return measure_kv_speed(config, settings, kv_type)

    def switches(self) -> Mapping[str, str]:
        from edgeinfer_backends.llamacpp.library import rotation_switch

        return {"rotation": rotation_switch()}

    def load_exit(
        self, files: ModelFiles, exit_path: Path, settings: RuntimeSettings, folder: Path
    ) -> Runtime:
        from edgeinfer_backends.llamacpp.exit_draft import assembled, forget_assembled

        draft, embeddings = assembled(files, exit_path, folder)
        try:
            return self._load(draft, settings, lambda _: True, embeddings)
        except BaseException:
            embeddings.close()
            forget_assembled(draft)
            raise

    def load(self, files: ModelFiles, settings: RuntimeSettings, progress: Progress) -> Runtime:
        return self._load(files, settings, progress, None)

    def _load(
        self,
        files: ModelFiles,
        settings: RuntimeSettings,
        progress: Progress,
        embeddings: TokenRows | None,
    ) -> Runtime:
        from edgeinfer_backends.llamacpp.lone_stream import LoneStream
        from edgeinfer_backends.llamacpp.native import create_context
        from edgeinfer_backends.llamacpp.runtime import LlamaCppRuntime
        from edgeinfer_backends.llamacpp.sequence_state import UnknownState
        from edgeinfer_backends.llamacpp.streams import PrivateStreams

        if files.format not in self.formats:
            raise LoadFailed(f"{files.name} is a {files.format} model; llama.cpp reads GGUF files")
        if settings.adapters:
            raise LoadFailed("adapters are not supported yet")
        native = create_context(files, settings, progress)
        if native.layout == "private":
            try:
                kind = LoneStream if native.sequences == 1 else PrivateStreams
                return kind(native, files, settings, embeddings)
            except UnknownState as error:  # of another llama.cpp than this was written for
                log.info("sequences share cells: %s", error)
            native = create_context(files, replace(settings, kv_layout="shared"), progress)
        return LlamaCppRuntime(native, files, settings, embeddings)
