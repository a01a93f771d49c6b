"""One file a compiler: how it is found, told and understood. None runs in this process."""
