import threading

from easyspec.thread_pool import started_pool


def test_every_thread_is_there_from_the_beginning() -> None:
    before = threading.active_count()
    pool = started_pool(3, "counted")
    try:
        assert threading.active_count() == before + 3
        assert [pool.submit(lambda: 5).result() for _ in range(10)] == [5] * 10
        assert threading.active_count() == before + 3
    finally:
        pool.shutdown()
