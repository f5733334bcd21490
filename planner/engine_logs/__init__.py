"""What an engine printed about its memory, laid beside the ledger: `planner explain-log`."""

from planner.engine_logs.explain import explain_log
from planner.engine_logs.explanation import Explanation, Line
from planner.engine_logs.read import EngineLog, read_log

__all__ = ["EngineLog", "Explanation", "Line", "explain_log", "read_log"]
