from tests.model.conftest import one_thread
from tests.ops.executors import multiplying, native, reference

__all__ = ["multiplying", "native", "one_thread", "reference"]
