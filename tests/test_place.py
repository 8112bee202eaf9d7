"""What is written takes its place whole or not at all, whatever the place is, and whenever a process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from converter import interrupt, place
from converter.errors import OutputError
from converter.place import HIDDEN, clear_stale, private, replacing, write_whole


def put(where: Path, text: str) -> None:
    with replacing(where) as staging:
        (staging / "manifest.json").write_text(text)
        (staging / "part").mkdir()
        (staging / "part" / "a").write_text(text)


def held(where: Path) -> str:
    """Return what is there: it is of one piece, and nothing lies beside it."""
    assert sorted(os.listdir(where)) == ["manifest.json", "part"]
    (one, two) = ((where / name).read_text() for name in ("manifest.json", "part/a"))
    assert one == two
    return one


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(HIDDEN)]


def test_a_folder_takes_its_place_and_another_takes_it_again(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folders" / "out"
    for text in ("1", "2"):
        put(out, text)
        assert held(out) == text
    assert not hidden(tmp_path)
    with pytest.raises(RuntimeError), replacing(out) as staging:  # noqa: PT012 - what fails is the block
        (staging / "manifest.json").touch()
        raise RuntimeError
    assert held(out) == "2"
    with pytest.raises(RuntimeError), replacing(tmp_path / "never" / "made"):
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["new"]


def test_a_link_stays_one_and_its_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/out")  # leads nowhere yet
    for text in ("1", "2"):
        put(tmp_path / "link", text)
        assert held(tmp_path / "disk" / "out") == text
        assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


def test_the_working_folder_is_filled_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    inode = out.stat().st_ino
    for text in ("1", "2"):
        put(Path(), text)
        assert held(out) == text
        assert out.stat().st_ino == inode  # a shell stands in it
    assert not hidden(tmp_path)


@pytest.mark.parametrize("bind", [False, True])
def test_a_mount_is_filled_where_it_is(tmp_path: Path, bind: bool) -> None:
    mount, source = tmp_path / "mount point", tmp_path / "source"
    mount.mkdir()
    source.mkdir()
    how = ["--bind", source] if bind else ["-t", "tmpfs", "tmpfs"]
    if os.geteuid() or subprocess.run(["mount", *how, mount], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        for text in ("1", "2"):
            put(mount, text)
            assert held(mount) == text
        put(mount / "inside", "3")
        put(mount / "inside", "4")
        assert held(mount / "inside") == "4"
    finally:
        subprocess.run(["umount", mount], check=True)
    assert not hidden(tmp_path)


def test_a_parent_that_is_not_ours_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    put(out, "1")
    inode = out.stat().st_ino
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    put(out, "2")
    assert (held(out), out.stat().st_ino) == ("2", inode)


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")) / "out"
    with replacing(out) as staging:
        str(staging).encode()  # some libraries want a name that can be
        (staging / "manifest.json").write_text("1")
    assert (out / "manifest.json").read_text() == "1"


class Killed(BaseException):
    pass


class Life:
    """Ends after so many calls; then every further one fails: a dead process changes nothing."""

    def __init__(self, calls: int) -> None:
        """Begin."""
        self.calls, self.over = calls, False

    def counted(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.over |= not self.calls
            if self.over:
                raise Killed
            self.calls -= 1
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, inside: bool
) -> None:
    """Each call that changes the disk is the last one once; what is left is then met by the next run."""
    monkeypatch.setattr(place, "_movable", lambda _: not inside)
    if not exchange:
        monkeypatch.setattr(place, "_exchanged", lambda *_: False)
    names = [(os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (Path, "mkdir"), (place, "_exchanged")]
    seen = set()
    for last in range(60):
        out = tmp_path / str(last) / "out"
        out.parent.mkdir()
        with monkeypatch.context() as patch:
            put(out, "old")
            life = Life(last)
            for module, name in names:
                patch.setattr(module, name, life.counted(getattr(module, name)))
            with suppress(Killed):
                put(out, "new")
        if out.exists() and (out / "manifest.json").exists():
            clear_stale(out)
        clear_stale(out.parent)
        if out.is_dir():
            clear_stale(out)
        seen.add(held(out))
        put(out, "next")
        assert held(out) == "next"
        assert not hidden(out.parent)
        if not life.over:
            break
    assert not life.over, "some swap has more steps than were tried"
    assert seen == {"old", "new"}


def test_what_a_living_process_holds_stays(tmp_path: Path) -> None:
    script = "import sys, time\nfrom pathlib import Path\nfrom converter.place import replacing\n"
    script += "with replacing(Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert clear_stale(tmp_path) == []
        (left,) = hidden(tmp_path)
        process.kill()
    deadline = time.monotonic() + 10
    while not clear_stale(tmp_path):
        assert time.monotonic() < deadline
    assert not hidden(tmp_path), left


def test_a_file_follows_no_link_and_has_no_name_that_can_be_foreseen(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "report.html"
    victim.write_text("mine")
    link.symlink_to(victim)
    (tmp_path / "report.html.part").symlink_to(victim)  # the name that it had once
    names = []
    for _ in range(2):
        write_whole(link, lambda beside: (names.append(beside.name), beside.write_text("page")))
    assert len(set(names)) == 2
    assert (victim.read_text(), link.read_text(), link.is_symlink()) == ("mine", "page", False)
    with pytest.raises(OSError, match="RuntimeError: the disk is full"):
        write_whole(link, lambda beside: (_ for _ in ()).throw(RuntimeError("the disk is full")))
    with pytest.raises(OutputError, match="must be a file"):
        write_whole(tmp_path, lambda beside: beside.touch())
    assert not hidden(tmp_path)
    assert link.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_files_have_the_permissions_of_new_ones(tmp_path: Path) -> None:
    with replacing(tmp_path / "out") as staging:
        (staging / "manifest.json").write_text(json.dumps({}))
        (staging / "manifest.json").chmod(0o600)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out", tmp_path / "out" / "manifest.json")}
    assert modes == {0o777 & ~umask(), 0o666 & ~umask()}


def test_the_cache_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.constants, "HF_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "nmsparse").mkdir(parents=True)
    (tmp_path / "home" / "nmsparse").chmod(0o755)
    private("evaluation")
    assert (tmp_path / "home" / "nmsparse").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(place.constants, "HF_HOME", str(tmp_path / "linked"))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "nmsparse").symlink_to(tmp_path / "home")
    with pytest.raises(OutputError, match="must be a folder of this user's own"):
        private("evaluation")
    (tmp_path / "file").touch()
    monkeypatch.setattr(place.constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="Set HF_HOME"):
        private("evaluation")


class Swallows:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def interrupted_by_the_way(out: Path) -> None:
    with replacing(out) as staging:
        (staging / "file").write_text("new")
        Swallows()  # is freed at once


def test_an_interruption_that_is_swallowed_ends_before_anything_takes_its_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    out, hook = tmp_path / "out", sys.unraisablehook
    try:
        interrupt.install()
        with pytest.raises(KeyboardInterrupt):
            interrupted_by_the_way(out)
        assert not list(tmp_path.iterdir())
        assert not capfd.readouterr().err, "Python says of what it swallows"
        interrupt.install()
        with replacing(out):
            pass
        assert out.is_dir()
    finally:
        sys.unraisablehook = hook
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
