from __future__ import annotations

from scripts import sizes


def test_no_file_and_no_function_is_longer_than_its_limit() -> None:
    over = [f"{size.place}: {size.lines} > {size.limit}" for size in sizes.measure() if size.over]
    assert not over, "\n".join(over)


def test_every_exception_has_a_reason_and_is_still_needed() -> None:
    needed = {size.place for size in sizes.measure() if size.lines > size.limit}
    assert set(sizes.EXCEPTIONS) <= needed
    assert all(len(reason) > 20 for reason in sizes.EXCEPTIONS.values())


def test_generated_code_is_not_counted_and_the_rest_is() -> None:
    places = {path.as_posix() for path in sizes.sources(sizes.ROOT)}
    assert "xllm_py/core/scheduler.py" in places
    assert "scripts/sizes.py" in places
    assert not [place for place in places if "_pb2" in place]


def test_a_long_file_and_a_long_method_are_seen_by_name() -> None:
    body = "\n".join(f"        x = {index}" for index in range(sizes.FUNCTION_LINES))
    text = f"class Box:\n    def long(self) -> None:\n{body}\n" + "\n" * sizes.FILE_LINES
    over = {size.place for size in sizes.sizes_of(text, "a.py") if size.over}
    assert over == {"a.py", "a.py:Box.long"}


def test_a_function_of_just_the_limit_passes() -> None:
    body = "\n".join(f"    x = {index}" for index in range(sizes.FUNCTION_LINES - 1))
    found = {size.place: size for size in sizes.sizes_of(f"def fits() -> None:\n{body}\n", "a.py")}
    assert found["a.py:fits"].lines == sizes.FUNCTION_LINES
    assert not found["a.py:fits"].over
