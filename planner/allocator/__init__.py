"""A simulator of torch's CUDA caching allocator: a trace of allocations → what is reserved.

    from planner.allocator import Alloc, Free, simulate

    stats = simulate([Alloc("a", 30 * 2**20), Free("a"), Alloc("b", 1000)])
    stats.peak_allocated_bytes, stats.peak_reserved_bytes

Events in `events.py`, rules in `device.py` and `expandable.py`, what comes out in `results.py`.
"""

from planner.allocator.device import DeviceAllocator as DeviceAllocator
from planner.allocator.events import Alloc as Alloc
from planner.allocator.events import BeginPool as BeginPool
from planner.allocator.events import EmptyCache as EmptyCache
from planner.allocator.events import EndPool as EndPool
from planner.allocator.events import Event as Event
from planner.allocator.events import Free as Free
from planner.allocator.events import Mark as Mark
from planner.allocator.events import RecordStream as RecordStream
from planner.allocator.events import ReleasePool as ReleasePool
from planner.allocator.events import Synchronize as Synchronize
from planner.allocator.results import AllocatorStats as AllocatorStats
from planner.allocator.results import MarkedUsage as MarkedUsage
from planner.allocator.results import OutOfMemory as OutOfMemory
from planner.allocator.results import OutOfMemoryError as OutOfMemoryError
from planner.allocator.results import Timeline as Timeline
from planner.allocator.results import Usage as Usage
from planner.allocator.settings import AllocatorSettings as AllocatorSettings
from planner.allocator.simulate import simulate as simulate
