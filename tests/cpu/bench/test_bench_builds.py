"""`bench builds`: what it says of two builds, and of one that does not run."""

import pytest

from bench.suites.builds import Build, main, measure


class Canned:
    """Answers a case with a digest, and nothing with the next of some times."""

    def __init__(self, digest: str, *times: float) -> None:
        self.digest, self.times = digest, iter(times)

    def ask(self, *case: int) -> str | float:
        return self.digest if case else next(self.times)


def test_ratios_are_of_each_round() -> None:
    old, new = Canned("a", 9.0, 10.0, 20.0, 40.0), Canned("a", 9.0, 11.0, 20.0, 80.0)
    row = measure(old, new, (64, 128, 1), 3)
    assert row == {"n": 64, "k": 128, "m": 1, "old_us": 20.0, "new_us": 20.0, "ratio": 1.1}


def test_other_bits_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match="64, 128, 1 differ"):
        measure(Canned("a"), Canned("b"), (64, 128, 1), 3)


def test_a_build_that_does_not_load(tmp_path, capfd) -> None:
    (tmp_path / "liquidgemm").mkdir()
    (tmp_path / "liquidgemm" / "__init__.py").write_text("raise ImportError('no library')")
    with Build(tmp_path) as build, pytest.raises(RuntimeError, match="ended"):
        build.ask(64, 128, 1)
    assert "no library" in capfd.readouterr().err


def test_a_folder_without_a_package(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path)])
    assert "expected a folder that holds a liquidgemm package" in capsys.readouterr().err
