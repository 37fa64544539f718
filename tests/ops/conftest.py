from tests.model.conftest import one_thread
from tests.ops.executors import native, reference

__all__ = ["native", "one_thread", "reference"]
