"""The detectors of personal data: speed on one core, recall and precision by kind, finds in files of yours.

Run: python benchmarks/data/personal.py [FILE or FOLDER ...] [--show]    (about half a minute)

Speed is UTF-8 bytes a second of process CPU time, best of three, over generated support chats (half of them with
something personal), prose, and rows of numbers; over files, every string in them. Recall and precision are those of the
labelled set in tests/data. `--show` prints every find in the files with the text around it: values and all, for eyes
that may see them. Prints tables and writes benchmarks/results/personal_data.json (counts and speeds only).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "personal_data.json"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "data")]

from personal_cases import KINDS, negatives, positives  # noqa: E402

from charkha.data.decoding import as_utf8, detect_encoding  # noqa: E402
from charkha.data.personal import find_personal  # noqa: E402
from charkha.data.scan import texts_within  # noqa: E402
from charkha.starter.paths import train_file  # noqa: E402

PROSE = {
    "en": "The spinning wheel stood by the window, and she worked at it all the afternoon of 1931 without a word. ",
    "hi": "चरखा खिड़की के पास रखा था, और वह पूरी दोपहर बिना कुछ बोले उस पर काम करती रही, जब तक कि दिन ढल नहीं गया। ",
    "ta": "இராட்டை சன்னல் அருகே இருந்தது, அவள் நாள் முழுவதும் ஒன்றும் பேசாமல் அதில் வேலை செய்தாள். ",
    "bn": "চরকাটি জানালার পাশে ছিল, আর সে সারা দুপুর কোনো কথা না বলে কাজ করে গেল, যতক্ষণ না দিন শেষ হল। ",
}
HELP_DESK = (
    "Hello, I am writing about the card that I got last month from your Pune branch.",
    "Please look into this as soon as you can, I have been waiting since Monday.",
    "The app shows an error when I try to pay my bill and nobody answers.",
)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    speeds = {name: round(megabytes_a_second(texts), 2) for name, texts in corpora().items()}
    print("\n".join(f"{name:<36}{speed:8.1f} MB/s" for name, speed in speeds.items()))
    kinds = figures()
    print(
        "\n".join(
            f"{kind:<18}{f['made']:6}  recall {f['recall']:.3f}  precision {f['precision']:.3f}"
            for kind, f in kinds.items()
        )
    )
    record = {
        "machine": {"processor": processor(), "python": platform.python_version()},
        "megabytes_a_second": speeds,
        "kinds": kinds,
    }
    if arguments.files:
        record["files"] = in_files(arguments.files, arguments.show)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def corpora() -> dict[str, list[str]]:
    """Name -> texts of about 2 MB each."""
    rng = random.Random(5)
    cases = [case.text for case in positives(rng, 400) + negatives(rng, 9600)]
    rng.shuffle(cases)
    found = {"labelled set, one line each": cases}
    for language, sentence in PROSE.items():
        found[f"prose {language}"] = [sentence * 8] * (2_000_000 // len((sentence * 8).encode()))
    chats = [" ".join(rng.choice(list(PROSE.values())) for _ in range(4)) + case for case in cases]
    found["chats, half with a find"] = chats
    english = [" ".join(rng.choices(HELP_DESK, k=2)) + " " + case for case in cases]
    found["English chats, each with a number"] = english
    found["starter rows"] = train_file().read_text(encoding="utf-8").splitlines() * 6
    found["rows of numbers"] = [
        ",".join(str(rng.randint(1, 10 ** rng.randint(1, 9))) for _ in range(40)) for _ in range(6000)
    ]
    return found


def megabytes_a_second(texts: Sequence[str]) -> float:
    """UTF-8 megabytes a second of process CPU time, best of three."""
    size = sum(len(text.encode()) for text in texts)
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        for text in texts:
            find_personal(text)
        best = min(best, time.process_time() - started)
    return size / 1e6 / best


def figures() -> dict[str, dict[str, float]]:
    """Kind -> texts made, recall and precision over the labelled set, as tests/data/test_personal_figures.py counts."""
    rng = random.Random(20250601)
    cases = positives(rng, 220) + negatives(rng, 5200)
    made, right, wrong = Counter(case.kind for case in cases), Counter(), Counter()
    for case in cases:
        for find in find_personal(case.text):
            is_right = (find.kind, find.start, find.end) == (case.kind, case.start, case.end)
            (right if is_right else wrong)[find.kind] += 1
    return {
        kind: {
            "made": made[kind],
            "recall": round(right[kind] / made[kind], 4),
            "precision": round(right[kind] / max(1, right[kind] + wrong[kind]), 4),
        }
        for kind in KINDS
    }


def in_files(paths: Sequence[Path], show: bool) -> dict[str, object]:
    """Speed and finds by kind over every string of the files."""
    counts: Counter[str] = Counter()
    size, seconds = 0, 0.0
    files = [file for given in paths for file in (given.rglob("*") if given.is_dir() else [given])]
    for path in sorted(files):
        texts = list(strings(path)) if path.is_file() else []
        size += sum(len(text.encode("utf-8", "replace")) for text in texts)
        for text in texts:
            started = time.process_time()
            finds = find_personal(text)
            seconds += time.process_time() - started
            for find in finds:
                counts[f"{find.kind} ({find.confidence})"] += 1
                if show:
                    around = text[max(0, find.start - 40) : find.start], text[find.end : find.end + 25]
                    print(f"{path.name}: {find.kind}: {around[0]!r} [[{text[find.start : find.end]}]] {around[1]!r}")
    print(f"files: {size / 1e6:.1f} MB, {size / 1e6 / seconds:.1f} MB/s, {dict(counts.most_common())}")
    return {
        "megabytes": round(size / 1e6, 2),
        "megabytes_a_second": round(size / 1e6 / seconds, 2),
        "finds": dict(counts.most_common()),
    }


def strings(path: Path) -> Iterator[str]:
    """Every string of a JSON or JSONL file, every line of any other text file; nothing of other files."""
    if path.suffix not in (".json", ".jsonl", ".txt", ".csv", ".md"):
        return
    data = path.read_bytes()
    text = b"".join(as_utf8([data], detect_encoding(data[: 1 << 20]))).decode("utf-8", "replace")
    try:
        values = [json.loads(text)] if path.suffix == ".json" else None
        if path.suffix == ".jsonl":
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        values = None
    if values is None:
        yield from text.split("\n")
        return
    for _, found in texts_within(values):
        yield found


if __name__ == "__main__":
    main()
