"""A plan's placement of the base in the words of the backend, and of the person."""

from __future__ import annotations

from charkha.backends.base import Streaming
from charkha.config import Config
from charkha.errors import ConfigError, ConfigProblem
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.streamed import buffer_bytes, cold_layers, hot_layer_bytes
from charkha.plan.streamed_time import copying, link_of
from charkha.plan.weights import targets_outside_layers
from charkha.training.choices import Chooser
from charkha.units import format_bytes

PLACEMENT, HOST_TABLES = "model.placement", "model.host_tables"
_TABLES_NOTE = {
    "none": "",
    "embedding": "; the embedding is on the host",
    "both": "; embedding and head are on the host",
}


def streaming_of(architecture: Architecture, settings: MemorySettings, machine: Machine) -> Streaming | None:
    """The settings' part that the engine takes; None for a resident base. Of a CPU no share is expected."""
    if not settings.streamed:
        return None
    expected = None
    if machine.gpu is not None:
        rate = link_of(machine, settings).bytes_per_second
        expected = copying(architecture, settings, machine, rate).hidden_share
    return Streaming(
        settings.streamed_slots,
        settings.streamed_resident_layers,
        embedding_on_host=settings.host_tables != "none",
        head_on_host=settings.host_tables == "both",
        expected_hidden_share=expected,
    )


def unplanned_streaming(config: Config, chooser: Chooser) -> Streaming | None:
    """For a base that the planner does not know: resident, unless streaming is asked for; then no layer stays."""
    asked = config.model.placement
    if asked == "auto":
        chooser.take(PLACEMENT, "resident", "what this base needs is not known")
    if config.model.host_tables == "auto":
        chooser.take(HOST_TABLES, "none", "what this base needs is not known")
    return written_streaming(config)


def written_streaming(config: Config) -> Streaming | None:
    """What a config itself says of it, with no layer that stays; None for a resident base."""
    if config.model.placement != "streamed":
        return None
    tables = config.model.host_tables
    return Streaming(embedding_on_host=tables in ("embedding", "both"), head_on_host=tables == "both")


def take_tables(config: Config, chooser: Chooser, architecture: Architecture, settings: MemorySettings) -> None:
    """Records where embedding and head are, if that is `auto`. Raises ConfigError for tables that cannot be there."""
    asked, trained = config.model.host_tables, config.adapter.modules_to_save
    outside = (*trained, *targets_outside_layers(architecture, settings))
    if asked in ("embedding", "both") and outside:
        problem = f"{asked}, but {outside[0]} is trained, which must be on the device"
        raise ConfigError("config", [ConfigProblem(HOST_TABLES, problem, remedy="use none")])
    if asked == "auto":
        chooser.take(HOST_TABLES, settings.host_tables, _why_tables(settings))


def _why_tables(settings: MemorySettings) -> str:
    if not settings.streamed:
        return "the whole base is on the device"
    if settings.host_tables == "none":
        return "embedding and head find room on the device"
    kept = "embedding and head take" if settings.host_tables == "both" else "the embedding takes"
    return f"{kept} room on the device that the rest needs"


def streamed_note(architecture: Architecture, settings: MemorySettings) -> str:
    """Where the layers of a streamed base are, and what that takes."""
    stay, slots, of = settings.streamed_resident_layers, settings.streamed_slots, architecture.layers
    waits = "on the disk" if settings.streamed_from == "disk" or settings.device == "cpu" else "in host memory"
    held = format_bytes(buffer_bytes(architecture, settings))
    waiting = format_bytes(cold_layers(architecture, settings) * hot_layer_bytes(architecture, settings))
    return (
        f"streamed base: {stay} of {of} layers stay on the device, the others ({waiting}) wait {waits} and pass "
        f"through {slots} slots; layers that stay and slots are {held}{_TABLES_NOTE[settings.host_tables]}"
    )
