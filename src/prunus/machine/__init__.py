"""The machine: devices, dtypes, processes, memory and time."""
