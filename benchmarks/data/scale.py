"""A million rows through inspecting, scanning and tokenizing: seconds and peak memory of each stage.

Run: python benchmarks/data/scale.py --model DIR [--rows 1000000] [--workers 2]     (wants an otherwise idle machine)

Rows are generated conversations of about 1 KB in English and Hindi; every fiftieth repeats one before it, exactly or
with a few words changed. Each stage runs in a process of its own. Memory is the largest sum of resident bytes over the
process and its children, looked at five times a second; pages mapped from files count, too. The share of the raw speed
compares processor seconds on one core, so that other work on the machine does not matter: rows of the file to tokens
with their mask (`from_text`: parsed, rendered, tokenized, marked; `tokenizing`: rendered, tokenized, marked), and
`tokenizers.Tokenizer.encode_batch` over the same texts, rendered already. Writes benchmarks/results/data_scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "data_scale.json"
STAGES = ("inspect", "scan", "tokenize", "speed")
LATIN = "ba co di fen gra hel in lo mer nt or pi ra sto ter un ve ing"
DEVANAGARI = "क का कि ग चर ज ता त्र दी न नी प बा म या र ल स ह ें"
WORDS = 30_000
SPEED_ROWS = 40_000


def main() -> None:
    """Generates, runs every stage, prints and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a tokenizer")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(measured(arguments)))
        return
    with TemporaryDirectory(prefix="charkha-scale-") as folder:
        path = Path(folder) / "rows.jsonl"
        generate(path, arguments.rows)
        results: dict[str, Any] = {"rows": arguments.rows, "bytes": path.stat().st_size, "workers": arguments.workers}
        results |= {"model": arguments.model.name, "python": platform.python_version(), "cpu": cpu_name()}
        results["tokenizers"] = version("tokenizers")
        for stage in STAGES:
            results[stage] = run_stage(stage, arguments, folder)
            print(stage, json.dumps(results[stage]), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def cpu_name() -> str:
    """The processor as Linux names it, and how many cores may be used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def generate(path: Path, rows: int) -> None:
    """Writes the rows; the same number gives the same bytes."""
    chosen = random.Random(7)
    words = [vocabulary_of(chosen, LATIN), vocabulary_of(chosen, DEVANAGARI)]
    recent: list[dict[str, Any]] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            if number % 50 == 49:
                row = altered(chosen.choice(recent), chosen, words[0])
            else:
                vocabulary = words[number % 4 == 0]
                question = " ".join(chosen.choices(vocabulary, k=20)) + f" {number}?"
                answer = " ".join(chosen.choices(vocabulary, k=110 if number % 4 else 45)) + "."
                row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            recent = [*recent[-19:], row]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def vocabulary_of(chosen: random.Random, syllables: str) -> list[str]:
    """Words of one to four syllables, as often as in language: the n-th about 1/n times (Zipf)."""
    words = ["".join(chosen.choices(syllables.split(), k=chosen.randint(1, 4))) for _ in range(WORDS)]
    return chosen.choices(words, weights=[1 / (rank + 1) for rank in range(WORDS)], k=200_000)


def altered(row: dict[str, Any], chosen: random.Random, words: list[str]) -> dict[str, Any]:
    """The row again, every other time with one word changed."""
    user, assistant = row["messages"]
    parts = assistant["content"].split()
    if chosen.random() < 0.5:
        parts[chosen.randrange(len(parts))] = chosen.choice(words)
    return {"messages": [user, {**assistant, "content": " ".join(parts)}]}


def run_stage(stage: str, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What the stage measured in a process of its own."""
    command = [
        sys.executable,
        str(Path(__file__)),
        "--stage",
        stage,
        "--folder",
        folder,
        "--model",
        str(arguments.model),
    ]
    command += ["--workers", str(arguments.workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": str(arguments.workers)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The stage's own figures with its seconds and peak memory."""
    work: Callable[[argparse.Namespace, Path], dict[str, Any]] = globals()[f"stage_{arguments.stage}"]
    watch = PeakMemory()
    begun = time.monotonic()
    figures = work(arguments, arguments.folder / "rows.jsonl")
    return {"seconds": round(time.monotonic() - begun, 1), "peak_rss_bytes": watch.stop(), **figures}


class PeakMemory:
    """The largest sum of resident bytes of this process and its children."""

    def __init__(self) -> None:
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        own = psutil.Process()
        while not self._done.wait(0.2):
            total = own.memory_info().rss
            for child in own.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self._peak = max(self._peak, total)

    def stop(self) -> int:
        """Ends the watch; bytes."""
        self._done.set()
        self._thread.join()
        return self._peak


def say(path: Path, rows: int) -> None:
    """Progress on stderr, every hundred thousand rows or so."""
    if rows % 50_000 < 1000:
        print(f"{path.name}: {rows:,}", file=sys.stderr, flush=True)


def stage_inspect(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """`charkha data inspect` without a model."""
    from charkha.data.inspect import inspect_file

    found = inspect_file(path, workers=arguments.workers, progress=say)
    return {"rows": found.file.row_count, "exact": found.duplicates, "problems": len(found.problems)}


def stage_scan(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """`charkha data scan`: personal data in every column, exact and near repetitions."""
    from charkha.data.scan import scan_files

    found = scan_files([path], workers=arguments.workers)
    assert found.duplicates is not None
    return {"findings": len(found.findings), "exact": found.duplicates.exact, "near": found.duplicates.near}


def stage_tokenize(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """From the file to the shards of a run, reading and splitting included."""
    from charkha.config_file import load_config
    from charkha.training.preparing import prepare_data

    config = arguments.folder / "charkha.yaml"
    config.write_text(
        f"model: {{base: {json.dumps(str(arguments.model.resolve()))}}}\noutput: run\n"
        f"data: {{train: [rows.jsonl], eval: 1%, template: chatml, num_proc: {arguments.workers}}}\n"
    )
    started = time.monotonic()
    data = prepare_data(load_config(config), arguments.model, arguments.folder / "run", 4096, None, tell)
    seconds = time.monotonic() - started
    tokens = int(data.train.lengths.sum())
    return {"rows": data.train.rows, "tokens": tokens, "tokens_per_second": round(tokens / seconds)}


def tell(text: str) -> None:
    """Progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def settings_of(arguments: argparse.Namespace) -> Any:
    """Tokenizer and ChatML."""
    from charkha.data.templates import load_template
    from charkha.data.tokenize import EncodeSettings
    from charkha.data.tokenizer import load_tokenizer

    return EncodeSettings(load_tokenizer(arguments.model), load_template(arguments.model, "chatml"))


def stage_speed(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Tokens a processor second of charkha and of the library alone, in turns over the same rows."""
    from charkha.data.formats import open_rows
    from charkha.data.render import render_row
    from charkha.data.tokenize import encode_block

    settings = settings_of(arguments)
    backend = settings.tokenizer._backend

    def len_of(texts: list[str]) -> int:
        return sum(map(len, backend.encode_batch(texts, add_special_tokens=False)))

    spent = {"reading": 0.0, "tokenizing": 0.0, "raw": 0.0}
    tokens = rows = 0
    for number, task in enumerate(open_rows(path).tasks):
        begun = time.process_time()
        block = task.run().rows
        reading = time.process_time() - begun
        texts = [render_row(row, settings.template, settings.tokenizer.special).text for row in block]
        pieces = [texts[start : start + 512] for start in range(0, len(texts), 512)]
        ways = {
            "raw": lambda pieces=pieces: sum(map(len_of, pieces)),
            "tokenizing": lambda block=block: encode_block(block, settings),
        }
        for way in sorted(ways, reverse=number % 2 == 0):  # in turns, since the second finds words in the cache
            begun = time.process_time()
            done = ways[way]()
            spent[way] += time.process_time() - begun
            tokens += done if way == "raw" else 0
        spent["reading"] += reading
        rows += len(block)
        if rows >= SPEED_ROWS:
            break
    spent["from_text"] = spent.pop("reading") + spent["tokenizing"]
    result: dict[str, Any] = {"rows": rows, "tokens": tokens}
    result |= {f"{name}_tokens_per_cpu_second": round(tokens / seconds) for name, seconds in spent.items()}
    for name in ("tokenizing", "from_text"):
        result[f"{name}_share_of_raw"] = round(spent["raw"] / spent[name], 3)
    return result


if __name__ == "__main__":
    main()
