"""What a run needs in memory, time and bytes, before it is started."""
