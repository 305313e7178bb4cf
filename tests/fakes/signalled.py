"""Runs a training program that gets a signal in a step: python signalled.py TERM 3 scripts/train_policy.py --pairs …

Of a distributed training the launcher gets it, as from a scheduler; its processes go on once it has handed it on. Before, each tells how
many models it holds.
"""

import gc
import os
import runpy
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from psychocounsel.training import Watch

number, in_step = signal.Signals[f"SIG{sys.argv[1]}"], int(sys.argv[2])


def on_step_begin(self, args, state, control, **_):
    if state.global_step + 1 == in_step:
        models = [one for one in gc.get_objects() if type(one).__name__.endswith("ForCausalLM")]
        weights = [sum(p.numel() + getattr(p, "ds_tensor", p).numel() for p in model.parameters()) for model in models]
        print(f"models in memory: {sum(map(bool, weights))}", file=sys.stderr, flush=True)
        rank = os.environ.get("RANK")
        if rank in (None, "0"):
            os.kill(os.getpid() if rank is None else os.getppid(), number)
        while not self.signalled:
            time.sleep(0.01)


Watch.on_step_begin = on_step_begin
del sys.argv[:3]
runpy.run_path(sys.argv[0], run_name="__main__")
