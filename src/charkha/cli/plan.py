"""`charkha plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, new_table, note, run_command, stdout_console

app = new_app()


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The run's charkha.yaml.", show_default=False)],
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="NAME", help="Plan for this card, or a machine file; repeat it for more cards."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", metavar="trace|closed_form", help="Trace the real step, or answer at once.")
    ] = "trace",
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Correct the plan by a few real steps on this device; loads the base model."),
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides a key; repeatable.")
    ] = None,
    buy_or_rent: Annotated[bool, typer.Option("--buy-or-rent", help="After how many months buying has paid.")] = False,
    hours_per_day: Annotated[float, typer.Option("--hours-per-day", help="For --buy-or-rent.")] = 8.0,
    write_machine: Annotated[
        Path | None,
        typer.Option("--write-machine", metavar="FILE", help="Writes the machine to a file for --gpu elsewhere."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Says before the run whether it fits, how long it takes, and what it costs; exit code 3 when it does not fit.

    Example: charkha plan charkha.yaml --gpu "RTX 4090"
    """

    def work() -> dict[str, Any]:
        from charkha.cli.environment import go_offline
        from charkha.errors import UsageError
        from charkha.verbs.planning import PlanWish, make_plan

        if method not in ("trace", "closed_form"):
            raise UsageError(f"{method!r} is no method", where="--method", remedy="use trace or closed_form")
        if probe:
            go_offline()
            note("probing: the base model is loaded and some steps are run, which takes as long as it takes")
        return make_plan(
            PlanWish(
                config=config,
                overrides=tuple(set_ or ()),
                gpus=tuple(gpu or ()),
                method="trace" if method == "trace" else "closed_form",
                buy_or_rent=buy_or_rent,
                hours_per_day=hours_per_day,
                write_machine=write_machine,
                probe=probe,
            )
        )

    run_command(work, _show, as_json)


def _show(result: dict[str, Any]) -> None:
    from charkha.units import format_bytes, format_seconds

    console, limit = stdout_console(), result["device_limit_bytes"]
    verdict = "fits" if result["fits"] else "does not fit"
    room = f" of {format_bytes(limit)}" if limit else ""
    devices = f", each of {result['devices']} devices" if result["devices"] > 1 else ""
    least = format_bytes(result["least_device_bytes"])
    console.print(f"{verdict} on {result['machine']}: needs at least {least}{room}{devices}  ({result['method']})")
    memory = new_table("memory at the peak", ">")
    for name, size in result["breakdown"].items():
        memory.add_row(name.replace("_", " "), format_bytes(size))
    memory.add_row("live tensors", format_bytes(result["peak_allocated_bytes"]))
    memory.add_row("reserved by torch", format_bytes(result["peak_reserved_bytes"]))
    memory.add_row("as nvidia-smi shows it", format_bytes(result["peak_device_bytes"]))
    memory.add_row("host memory", format_bytes(result["host_ram_bytes"]))
    memory.add_row("disk", format_bytes(result["disk_bytes"]))
    console.print(memory)
    if result["streaming"] is not None:
        console.print(_streaming_table(result["streaming"]))
    console.print(_run_table(result, format_seconds))
    if result.get("probe") and result["probe"]["corrected"]:
        console.print(_probe_table(result["probe"]))
    note(_generation(result["generation"], format_bytes))
    for alternative in result["alternatives"]:
        note(_alternative(alternative, format_seconds))
    if "buy_or_rent" in result:
        note(_buy_or_rent(result["buy_or_rent"]))
    for reason in result["reasons"]:
        note(f"  {reason}")


def _generation(told: dict[str, Any], format_bytes: Any) -> str:
    names = {"adapter": "base and adapter", "merged": "the merged model" if told["adapter"] else "the tuned model"}
    parts = [
        f"{format_bytes(told[key]['peak_allocated_bytes'])} with {name}"
        + (" (more than is free)" if told[key]["fits"] is False else "")
        for key, name in names.items()
        if told[key]
    ]
    cache = format_bytes(told["kv_cache_bytes_1000_tokens"])
    return f"chat at {told['tokens']} tokens: {', '.join(parts)}; {cache} of it per 1000 tokens"


def _streaming_table(streaming: dict[str, Any]) -> Any:
    from charkha.units import format_bytes

    table, waits = new_table("the streamed base", ">"), "on the disk" if streaming["waits_in"] == "disk" else "in RAM"
    stay = f"{streaming['hot_layers']} of {streaming['layers']}, and {streaming['slots']} slots"
    table.add_row("layers that stay", stay)
    table.add_row("slots and layers that stay", format_bytes(streaming["device_buffer_bytes"]))
    table.add_row(f"the base, {waits}", format_bytes(streaming["slab_bytes"]))
    table.add_row("RAM that is enough", format_bytes(streaming["enough_ram_bytes"]))
    table.add_row("moved in a micro step", f"{streaming['moved_bytes_per_micro_step'] / 1e9:.1f} GB")
    for speed in (streaming, *streaming["at_other_speeds"]):
        hidden = f"{speed['hidden_share']:.0%} hidden, {speed['tokens_per_second']:,.0f} tokens/s"
        free = "" if speed["free_from_tokens"] is None else f", all from {speed['free_from_tokens']:,} tokens"
        # What this machine does is known or taken from a table; the source's first word says which.
        mark = "" if speed is not streaming else f" ({streaming['bytes_per_second_source'].partition(':')[0]})"
        table.add_row(f"at {speed['bytes_per_second'] / 1e9:.1f} GB/s{mark}", hidden + free)
    return table


def _run_table(result: dict[str, Any], format_seconds: Any) -> Any:
    table, cost = new_table("the run", ">"), result["cost"]
    table.add_row("trained of all parameters", f"{result['trainable_parameters']:,} of {result['total_parameters']:,}")
    table.add_row("tokens per second", f"{result['tokens_per_second']:,.0f}")
    if result["seconds"] is not None:
        table.add_row("time, half of the runs", format_seconds(result["seconds"]))
        table.add_row("time, nine of ten runs", format_seconds(result["seconds_p90"]))
        table.add_row("energy at the wall", f"{result['energy_kwh']:.2f} kWh at {cost['wall_w']} W")
        price = f"{cost['electricity']:.2f} {cost['currency']} at {cost['electricity_per_kwh']} per kWh"
        table.add_row("electricity", price)
        if cost["rental_equivalent"] is not None:
            rent = f"{cost['rental_equivalent']:.0f} {cost['currency']} ({cost['rental_provider']}, tax included)"
            table.add_row("the same hours rented", rent)
    table.add_row("UPS to save and stop", f"{cost['ups_minutes']:.0f} min, {cost['ups_wh']:.0f} Wh")
    return table


def _probe_table(probe: dict[str, Any]) -> Any:
    from charkha.units import format_bytes

    table = new_table("measured", ">rows", ">longest row", ">seconds a step", ">live tensors")
    for name in ("worst", "median"):
        one = probe[name]
        peak = "-" if one["peak_allocated_bytes"] is None else format_bytes(one["peak_allocated_bytes"])
        table.add_row(
            f"{name}, {one['steps']} steps", str(one["rows"]), str(one["longest_row"]), f"{one['seconds']:.3g}", peak
        )
    return table


def _alternative(alternative: dict[str, Any], format_seconds: Any) -> str:
    if alternative["name"] == "other_machines":
        machines = (f"{machine['count']} x {machine['gpu']}" for machine in alternative["machines"])
        return f"would fit on: {', '.join(machines) or 'no machine of up to 16 cards of the table'}"
    changes = ", ".join(f"{key}={value}" for key, value in alternative["changes"].items()) or "as it is"
    taken = "" if alternative["seconds"] is None else f", {format_seconds(alternative['seconds'])}"
    speed = f"{alternative['tokens_per_second']:,.0f} tokens/s{taken}"
    return f"{alternative['name'].replace('_', ' ')}: {changes}  ({speed}; {alternative['reason']})"


def _buy_or_rent(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "buy or rent: no price or no offer for this card in the tables"
    months = "never" if answer["months"] is None else f"after {answer['months']:.0f} months"
    return (
        f"buy or rent: {answer['gpu']} for {answer['price']:,.0f} {answer['currency']} pays {months} at "
        f"{answer['hours_per_day']:g} h a day against {answer['rental_per_hour']:.0f} an hour "
        f"({answer['rental_provider']}); electricity {answer['electricity_per_hour']:.1f} an hour"
    )
