from __future__ import annotations
import argparse, pathlib
from bench.measure import Options, MIB
from bench.sections import against
parser = argparse.ArgumentParser()
parser.add_argument("--against", type=pathlib.Path)
parser.add_argument("--quick", action="store_true")
parser.add_argument("--rounds", type=int)
arguments = parser.parse_args()
quick = arguments.quick
options = Options(quick, (8 if quick else 50) * MIB, arguments.rounds or (3 if quick else 21), [1], arguments.against)
for f in against(options):
    print(f"{f.what:45} {f.ours*1000:9.1f} ms {f.theirs*1000:9.1f} ms  {f.value:.3f} ({f.spread[0]:.2f}-{f.spread[1]:.2f})", "" if f.met else "WORSE", flush=True)
