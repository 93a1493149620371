"""What a start imports: of torch's compiler nothing, unless it is asked for. It is a thousand modules and a second."""

import json
import os
import subprocess
import sys
from pathlib import Path

from small_runs import folder_of, small, tokens

REPO = Path(__file__).resolve().parents[2]

# All commands of one program after each other in one process, which then tells what is imported.
PROGRAM = """
import json, sys
import train_gpt
words, folder = json.loads(sys.argv[1]), sys.argv[2]
told = {}
def after(name, code):
    assert code == 0, (name, code)
    compiler = [m for m in sys.modules if m.split(".")[:2] in (["torch", "_dynamo"], ["torch", "_inductor"])]
    told[name] = [len(sys.modules), len(compiler), "sympy" in sys.modules]
after("train", train_gpt.main(words))
more = ["--dtype=bfloat16", "--run_name=other"]  # attention by its operator
after("bfloat16", train_gpt.main([word for word in words if word.partition("=")[0] != "--run_name"] + more))
run = f"{folder}/run"
after("sample", train_gpt.main(["sample", run, "--prompt=a", "--max_new_tokens=2"]))
after("evaluate", train_gpt.main(["evaluate", run]))
after("export", train_gpt.main(["export", run, f"{folder}/model"]))
from lab import cli, train
flags = "--model=mlp --data=names --steps=2 --row_tokens=64 --batch_tokens=128 --limit_chars=12000".split()
after("lab", cli.run(train.main, [*flags, f"--output_dir={folder}/lab"]))
print(json.dumps(told))
"""


def test_no_start_imports_torchs_compiler(tmp_path):
    data = folder_of(tmp_path / "data", tokens(2000))
    words = small(f"--train_files={data}/train_*.bin", f"--val_files={data}/val_*.bin", f"--output_dir={tmp_path}")
    command = [sys.executable, "-c", PROGRAM, json.dumps(words), str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    for name, (modules, compiler, sympy) in told.items():
        assert (compiler, sympy) == (0, False), f"{name}: {told}"
        assert name == "lab" or modules < 1400, f"{name}: {told}"  # 1250 with torch 2.13
