"""What a power cut may leave on the disk, from a record of the operations before it.

A small file system in memory keeps apart what is durable and what only the system's memory holds: the bytes of a file
become durable when the file is synced, the entries of a folder (new names, renames, removals) when the folder is. A
synced file whose name was not synced may be gone; a renamed one may have its old name. Until then, any part of it may
have reached the disk, in any order. One folder's part of a rename is never split (no file system in use does that),
but the two folders of a rename between folders are independent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Union

from recording_disk import Operation

Tree = dict[str, Union[bytes, "Tree"]]  # name -> the bytes of a file, or a folder
Write = tuple[int, bytes] | None  # (offset, bytes); None empties the file
SECTOR_BYTES = (512, 4096)


class File:
    """The bytes that are on the disk, and the writes since then."""

    def __init__(self) -> None:
        self.synced = b""
        self.unsynced: list[Write] = []

    def with_writes(self, writes: Sequence[Write], *, zeroed: bool = False) -> bytes:
        """The bytes once `writes` have reached the disk; zeroed, only their places and not their data have."""
        if not writes:
            return self.synced
        data = bytearray(self.synced)
        for write in writes:
            if write is None:
                data.clear()
                continue
            offset, piece = write
            data.extend(bytes(max(0, offset - len(data))))  # what lies before it never came
            data[offset : offset + len(piece)] = bytes(len(piece)) if zeroed else piece
        return bytes(data)

    def now(self) -> bytes:
        return self.with_writes(self.unsynced)

    def sync(self) -> None:
        self.synced, self.unsynced = self.now(), []


class Folder:
    """The entries that are on the disk, and the changes since then. One change is kept whole or lost whole."""

    def __init__(self) -> None:
        self.synced: dict[str, Node] = {}
        self.unsynced: list[dict[str, Node | None]] = []

    def with_changes(self, changes: Sequence[dict[str, Node | None]]) -> dict[str, Node]:
        entries = dict(self.synced)
        for change in changes:
            for name, node in change.items():
                entries.pop(name, None)
                if node is not None:
                    entries[name] = node
        return entries

    def now(self) -> dict[str, Node]:
        return self.with_changes(self.unsynced)

    def sync(self) -> None:
        self.synced, self.unsynced = self.now(), []


Node = File | Folder


class DiskModel:
    """The disk below `root` as operations go by. What no operation made was there before, durably."""

    def __init__(self, root: Path) -> None:
        self._path = root
        self._root = Folder()
        self._last_written: File | None = None

    def apply(self, operation: Operation) -> None:
        """One operation; only a sync makes anything durable. A refused one leaves the data that it took."""
        if operation.error is not None and operation.kind != "write":
            return
        match operation.kind:
            case "create":
                self._open(operation.path).unsynced.append(None)
            case "write":
                self._last_written = self._open(operation.path)
                self._last_written.unsynced.append((operation.offset, operation.data))
            case "sync":
                self._open(operation.path).sync()
            case "sync_folder":
                self._folder(operation.path).sync()
            case "make_folder":
                self._change(operation.path, Folder())
            case "unlink" | "remove_empty_folder":
                self._change(operation.path, None)
            case "rename":
                self._rename(operation.path, operation.target)
            case other:
                raise ValueError(f"the model knows no operation {other!r}")

    def _folder(self, path: Path) -> Folder:
        folder = self._root
        for name in path.relative_to(self._path).parts:
            inner = folder.now().get(name)
            if inner is None:
                inner = folder.synced[name] = Folder()
            assert isinstance(inner, Folder), f"{path} is not a folder"
            folder = inner
        return folder

    def _open(self, path: Path) -> File:
        """The file; a new one when there is none (appending opens a file without an operation of its own)."""
        file = self._folder(path.parent).now().get(path.name)
        if file is None:
            file = File()
            self._change(path, file)
        assert isinstance(file, File), f"{path} is not a file"
        return file

    def _change(self, path: Path, node: Node | None) -> None:
        self._folder(path.parent).unsynced.append({path.name: node})

    def _rename(self, source: Path, target: Path | None) -> None:
        assert target is not None
        node = self._folder(source.parent).now()[source.name]
        if source.parent == target.parent:
            self._folder(source.parent).unsynced.append({source.name: None, target.name: node})
        else:
            self._change(target, node)
            self._change(source, None)

    def states(self, picker: random.Random, random_states: int = 1) -> Iterator[tuple[str, Tree]]:
        """(rule, what is on the disk) for a cut now, by every rule."""
        yield "nothing unsynced kept", self._tree(lambda file: file.synced, lambda folder: folder.synced)
        yield "everything kept", self._tree(File.now, Folder.now)
        yield "names lost, data kept", self._tree(File.now, lambda folder: folder.synced)
        yield "names kept, data lost", self._tree(lambda file: file.synced, Folder.now)
        yield (
            "names and sizes kept, data zeroed",
            self._tree(lambda file: file.with_writes(file.unsynced, zeroed=True), Folder.now),
        )
        for sector in SECTOR_BYTES:
            if (torn := self._torn(sector, picker)) is not None:
                yield f"last write torn at {sector}", torn
        for _ in range(random_states):
            yield "a random part kept", self._random(picker)

    def _torn(self, sector: int, picker: random.Random) -> Tree | None:
        """Everything kept, but of the last unsynced write only some sectors from its beginning; None without one."""
        torn = self._last_written
        if torn is None or not torn.unsynced or torn.unsynced[-1] is None:
            return None
        offset, piece = torn.unsynced[-1]
        cuts = [place - offset for place in range(0, offset + len(piece), sector) if place > offset]
        kept = piece[: picker.choice(cuts or [0])]
        bytes_left = torn.with_writes([*torn.unsynced[:-1], (offset, kept)])
        return self._tree(lambda file: bytes_left if file is torn else file.now(), Folder.now)

    def _random(self, picker: random.Random) -> Tree:
        """Every write and every change of a folder kept or not, each by itself."""
        share = picker.choice((0.2, 0.5, 0.8))

        def some(changes: list) -> list:
            return [change for change in changes if picker.random() < share]

        def of_file(file: File) -> bytes:
            return file.with_writes(some(file.unsynced), zeroed=picker.random() < 0.2)

        return self._tree(of_file, lambda folder: folder.with_changes(some(folder.unsynced)))

    def _tree(self, of_file: Callable[[File], bytes], of_folder: Callable[[Folder], dict[str, Node]]) -> Tree:
        def tree(folder: Folder) -> Tree:
            return {
                name: of_file(node) if isinstance(node, File) else tree(node)
                for name, node in of_folder(folder).items()
            }

        return tree(self._root)


def states_after_cuts(
    operations: Sequence[Operation],
    root: Path,
    *,
    seed: int = 0,
    random_states: int = 1,
    first: int = 0,
    every: int = 1,
) -> Iterator[tuple[int, str, Tree]]:
    """(operations done, rule, what is on the disk) for cuts `every` so many operations, from `first` on."""
    model, picker = DiskModel(root), random.Random(seed)
    for done in range(len(operations) + 1):
        if done:
            model.apply(operations[done - 1])
        if done >= first and ((done - first) % every == 0 or done == len(operations)):
            for rule, tree in model.states(picker, random_states):
                yield done, rule, tree


def identity(tree: Tree) -> int:
    """A number that two trees share only when they are the same."""
    return hash(tuple((name, inner if isinstance(inner, bytes) else identity(inner)) for name, inner in tree.items()))


def write_tree(tree: Tree, folder: Path) -> None:
    """Makes `folder` hold what the disk held."""
    folder.mkdir()
    for name, inner in tree.items():
        if isinstance(inner, bytes):
            (folder / name).write_bytes(inner)
        else:
            write_tree(inner, folder / name)
