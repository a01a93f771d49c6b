"""One file a compiler: how it is found, told what to do, and understood. None runs in this process."""
