"""Two runs in one folder, folders that go away, and what stays of the checkpoints: rows alone.

Their tests stand beside those of the code that they test.
"""

from tests.faults.rows import linked

RETENTION = "tests/checkpoint/test_checkpoint.py"
LOCK = "tests/test_lock.py"

linked(
    "anything in a run folder",
    test=f"{RETENTION}::test_whatever_lies_there_the_right_steps_stay",
    fault="any set of valid, damaged, linked, renamed and planted folders, any saves and restarts",
    must="what was just saved stays, the right valid ones stay, nothing damaged or linked is"
    " touched",
)
linked(
    "damaged newer checkpoints",
    test="tests/test_train.py::test_damaged_newer_steps_do_not_cost_the_valid_ones",
    fault="two damaged folders above all steps of a run",
    must="they push out no valid step, and the run goes on",
)
linked(
    "links and files in the way of saving",
    test=f"{RETENTION}::test_links_and_files_in_the_way_of_saving",
    fault="links and files under the names of steps and temporary folders",
    must="saving goes on; what a link points to is never touched",
)
linked(
    "two starts in one folder",
    test=f"{LOCK}::test_of_many_starts_at_once_one_has_the_folder",
    fault="many starts at once, with and without a lock that was left over",
    must="one has the folder",
)
linked(
    "a run that is stopped and goes on",
    test=f"{LOCK}::test_a_stopped_process_keeps_its_folder",
    fault="SIGSTOP to the run that has the folder, and another start",
    must="the other start is refused",
)
linked(
    "a lock that is lost",
    test="tests/test_train.py::test_a_run_that_lost_its_folder_ends_and_writes_nothing_more",
    fault="the lock is taken away or deleted, or the folder is replaced",
    must="the run sees it at its next step, ends, and writes nothing more",
)
linked(
    "an outcome that another run owns",
    test="tests/test_outcome.py::test_only_who_holds_the_folder_writes_its_outcome",
    fault="a second start in the folder of a run",
    must="it leaves outcome.json alone, and its own launch script learns why it ended",
)
linked(
    "a checkpoint without code",
    test=f"{RETENTION}::test_only_safetensors_and_json_are_read",
    fault="pickles beside a checkpoint",
    must="nothing but safetensors and JSON is opened",
)
