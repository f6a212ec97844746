from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHEELS = sorted((ROOT / "dist").glob("*.whl"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `wheel_path` once for each wheel in dist/."""
    if "wheel_path" in metafunc.fixturenames:
        if not WHEELS:
            raise pytest.UsageError(f"no wheels in {ROOT / 'dist'}: run ./nox -s wheels")
        metafunc.parametrize("wheel_path", WHEELS, ids=lambda path: path.name.split("-")[0])


@pytest.fixture(scope="session")
def wheel_paths() -> list[Path]:
    """The wheels in dist/."""
    return WHEELS
