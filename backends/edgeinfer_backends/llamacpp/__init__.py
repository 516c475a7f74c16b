"""llama.cpp through the ctypes layer of llama-cpp-python: CPU, CUDA, Vulkan, Metal, as built."""

from __future__ import annotations

from edgeinfer.backend import Backend, Probe, Progress, Runtime, RuntimeSettings
from edgeinfer.errors import BackendUnavailable, LoadFailed
from edgeinfer_models.model_files import ModelFiles


class LlamaCppBackend(Backend):
    name = "llamacpp"
    formats = ("gguf",)

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

    def load(self, files: ModelFiles, settings: RuntimeSettings, progress: Progress) -> Runtime:
        from edgeinfer_backends.llamacpp.native import (
            MAX_NATIVE_SEQUENCES,
            RESERVED_SEQUENCES,
            create_context,
        )
        from edgeinfer_backends.llamacpp.runtime import LlamaCppRuntime

        if files.format not in self.formats:
            raise LoadFailed(f"{files.name} is a {files.format} model; llama.cpp reads GGUF files")
        if settings.adapters:
            raise LoadFailed("adapters are not supported yet")
        # running sequences, and as many again for forks and chats that stay live between turns
        handles = min(2 * settings.sequences + 8, MAX_NATIVE_SEQUENCES - RESERVED_SEQUENCES)
        native = create_context(files, settings, handles, progress)
        return LlamaCppRuntime(native, files, settings, handles)
