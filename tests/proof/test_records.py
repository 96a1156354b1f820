"""The tables of what was proved."""

from pathlib import Path

from tests.proof.records import FaultRecord, FaultyRun, Proof, Proved, faults_table, proof_table


def test_a_table_of_faults_has_a_row_a_kind_and_one_for_all_kills(tmp_path: Path):
    def run(fault: str, injected: int, seconds: tuple[float, ...], goodput: float, *, identical: bool = True) -> FaultyRun:
        return FaultyRun(
            fault=fault, injected=injected, recovered=injected, seconds_to_step=seconds, goodput=goodput, identical=identical
        )  # fmt: skip

    versions, hardware = {"torch": "2"}, {"cpu": "x", "cpus": "2", "vectors": "AVX2"}
    runs = (
        run("503", 7, (0.5, 1.5), 0.5),
        run("worker killed", 1, (4.0,), 0.2),
        run("command killed", 1, (), 0.4, identical=False),
        run("worker killed", 1, (8.0,), 0.3),
    )
    record = FaultRecord(
        command="c", date="d", seconds=1.0, commit="c", versions=versions, hardware=hardware, seconds_without_faults=1.0,
        runs=runs,
    )  # fmt: skip
    (tmp_path / record.file_name).write_bytes(record.to_bytes())
    rows = faults_table(tmp_path).splitlines()[2:6]
    assert rows == [
        "| 503 | 7 | 7 | 1.0 s | 1.4 s | 0.50 | 1 of 1 runs |",
        "| worker killed | 2 | 2 | 6.0 s | 7.8 s | 0.25 | 2 of 2 runs |",
        "| command killed | 1 | 1 |  |  | 0.40 | 0 of 1 runs |",
        "| all kills | 3 | 3 | 6.0 s | 7.8 s | 0.30 | 2 of 3 runs |",
    ]
    assert "unmeasured" in faults_table(tmp_path / "none")


def test_a_table_of_proof_adds_up_what_was_tried(tmp_path: Path):
    tried = (
        Proved(what="worker killed", n=1, equal=1, detail="a"),
        Proved(what="worker killed", n=1, equal=0, detail="b"),
        Proved(what="schedules", n=10_000, equal=10_000, detail=""),
    )
    record = Proof(
        date="2026-01-01", commit="c", versions={"torch": "2"}, hardware={"cpus": "2", "vectors": "X"}, tried=tried
    )
    (tmp_path / record.file_name).write_bytes(record.to_bytes())
    table = proof_table(tmp_path)
    assert "| worker killed | 1 of 2 |" in table
    assert "| schedules | 10,000 of 10,000 |" in table
    assert "unmeasured" in proof_table(tmp_path / "none")
