"""Memory grows linearly: 16,384 tokens and 8 heads fit into 1.5 GB on one core."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, re, resource
from pathlib import Path
import torch

def peak():
    # getrusage hands down the peak of the process that started this one; /proc does not.
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
from interp.stream.reducers import by_name
from interp.stream.tiles import stream
before = peak()
n = 16384
generator = torch.Generator().manual_seed(0)
query = torch.randn(1, 8, n, 16, generator=generator)
key, value = (torch.randn(1, 4, n, 16, generator=generator) for _ in range(2))
names = ["received", "entropy", "distance", "top_keys", "offsets", "segments"]
reducers = [by_name(name, segments={"sink": [0], "middle": range(4000, 8000)}) for name in names]
done = stream(query, key, value, reducers=reducers, want_output=True)
last = torch.softmax(query[0, :, -1:] @ key[0].repeat_interleave(2, 0).mT / 4, -1)[:, 0]
entropy = torch.special.entr(last).sum(-1)
print(json.dumps({
    "before": before,
    "peak": peak(),
    "sizes": {r.name: dict(r.finish().sizes) for r in reducers},
    "entropy": float((torch.tensor(reducers[1].finish().values[:, -1]) - entropy).abs().max()),
}))
"""


def test_sixteen_thousand_tokens_stay_below_one_and_a_half_gigabytes():
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True,
                          capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] < 1.5e9
    # One N x N matrix of one head in float32 is 1.07 GB: nothing of that kind was ever held.
    assert found["peak"] - found["before"] < 0.5e9
    assert found["entropy"] < 1e-5
    assert found["sizes"]["received"] == {"head": 8, "key": 16384}
    assert found["sizes"]["segments"] == {"head": 8, "query": 16384, "segment": 2}
