"""Imported by the forkserver alone, first of all: ties it to the executor that started it.

The workers' parent in the kernel's eyes is the forkserver, so it has to die with the executor for their death
signal to mean anything. The alive-pipe of ``multiprocessing`` is not enough: every worker holds its other end.
"""

from executor.child import die_with_parent

die_with_parent()
