import subprocess
import sys

FREED = """
import numpy as np, psutil
from samq.sensitivity.memory import return_freed_memory
return_freed_memory()
np.zeros(2**25, np.uint8)  # by itself glibc keeps as large arrays from now on
before = psutil.Process().memory_info().rss
kept = []
for _ in range(20):
    array = np.ones(2**24, np.uint8)
    kept.append(np.ones(2**16, np.uint8))  # as large a hole stays in a heap
    del array
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


def test_freed_arrays_are_returned_to_the_system():
    output = subprocess.run([sys.executable, "-c", FREED], check=True, capture_output=True, text=True).stdout
    assert float(output) < 8
