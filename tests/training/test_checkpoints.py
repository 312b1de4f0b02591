import signal
import subprocess
import sys

import pytest

from torchtune_fused.training.checkpoints import CheckpointFolder

# Writes two checkpoints, and is stopped within the third.
WRITER = """\
import sys, time
from pathlib import Path
from torchtune_fused.training.checkpoints import CheckpointFolder

checkpoints = CheckpointFolder(Path(sys.argv[1]), keep=2)
for step in (1, 2, 3):
    with checkpoints.writing(step) as folder:
        (folder / "weights").write_text(str(step))
        if step == 3:
            print("writing", flush=True)
            time.sleep(60)
"""


def write(checkpoints, step):
    with checkpoints.writing(step) as folder:
        (folder / "part").mkdir()
        (folder / "part/weights").write_text(str(step))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_found_by_its_number_and_the_last_are_kept(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "new/folder", keep=3)
    assert checkpoints.newest() is None
    for step in (8, 9, 10, 11):
        write(checkpoints, step)
    assert checkpoints.newest() == (11, tmp_path / "new/folder/step_11")
    assert names(tmp_path / "new/folder") == ["step_10", "step_11", "step_9"]
    assert (tmp_path / "new/folder/step_10/part/weights").read_text() == "10"


def test_a_run_killed_while_it_writes_leaves_the_checkpoints_before(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "writing\n"
    run.send_signal(signal.SIGKILL)
    run.communicate()
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    assert checkpoints.newest() == (2, tmp_path / "step_2")
    assert ".saving-step_3" in names(tmp_path)
    write(checkpoints, 3)  # on top of what is left of it
    assert names(tmp_path) == ["step_2", "step_3"]
    assert (tmp_path / "step_3/part/weights").read_text() == "3"
    assert not (tmp_path / "step_3/weights").exists()


def test_a_checkpoint_that_was_half_deleted_is_none(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    write(checkpoints, 1)
    (tmp_path / "step_1").rename(tmp_path / ".deleting-step_1")  # and killed in the middle of it
    assert checkpoints.newest() is None
    write(checkpoints, 2)
    assert names(tmp_path) == ["step_2"]


def test_an_error_while_writing_leaves_nothing_but_the_last_one(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    write(checkpoints, 1)
    with pytest.raises(OSError, match="No space left"), checkpoints.writing(2) as folder:
        (folder / "weights").write_text("2")
        raise OSError("No space left on device")
    assert names(tmp_path) == ["step_1"]


def test_a_full_disk_is_survived(tmp_path):
    """A file of no more than 100 bytes, by the limit of the operating system."""
    program = WRITER.replace("import sys", "import resource, sys", 1).replace(
        "for step", "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\nfor step"
    )
    program = program.replace("str(step)", "str(step) * 99 * step")
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert "OSError: [Errno 27] File too large" in run.stderr
    assert names(tmp_path) == ["step_1"]


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    for name in ("metrics.txt", "step_1.txt", "step_x"):
        (tmp_path / name).touch()
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    assert checkpoints.newest() is None
    write(checkpoints, 2)
    write(checkpoints, 3)
    assert names(tmp_path) == ["metrics.txt", "step_1.txt", "step_3", "step_x"]
