"""Quantise a folder of models as tasks of Ray, on one machine or on a cluster that shares the folders.

    python -m pip install ".[ray]"    # in a clone of the repository
    python examples/ray_batch.py models/checkpoints --out models/checkpoints-nfq --preset small
    python examples/ray_batch.py models/checkpoints --out models/checkpoints-nfq --gpus 0.5    # two tasks on each GPU

Without Ray, `nfq batch` on several machines shares the work too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray

import nfq_core
from nfq_core.sizes import size_in_words


def quantize(source: Path, out: Path, preset: str, gpus: float) -> str:
    """Quantise one model on the machine that Ray chose; returns a line about it."""
    try:
        made = nfq_core.quantize_file(source, out, preset=preset, device="cuda" if gpus else None)
    except nfq_core.TargetExistsError:
        return f"{source}: done before"
    except nfq_core.NFQError as error:
        return f"failed: {error}"
    return f"{source}: {size_in_words(made['original_bytes'])} -> {size_in_words(made['file_bytes'])}, {made['target']}"


def main() -> int:
    """Start a task for each model; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of .safetensors models, which all machines can read")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, which all machines can write")
    parser.add_argument("--preset", default="balanced", help="large, balanced, small or tiny (default: %(default)s)")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs of a task (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a task, also a fraction (default: none)")
    parser.add_argument("--address", help="the cluster, such as auto (default: start Ray on this machine)")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(options.folder.resolve().glob("*.safetensors"))
    models = [file for file in files if not file.name.endswith(".nfq.safetensors")]

    ray.init(address=options.address, **({} if options.address else {"include_dashboard": False}))
    if options.gpus > ray.cluster_resources().get("GPU", 0):
        parser.exit(1, f"Ray has no {options.gpus:g} GPUs here; leave --gpus out, or join a cluster with --address\n")
    task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus)(quantize)
    tasks = {task.remote(model, out, options.preset, options.gpus): model for model in models}
    waiting = list(tasks)
    failed = False
    while waiting:
        finished, waiting = ray.wait(waiting)
        try:
            line = ray.get(finished[0])
        except ray.exceptions.RayError as error:
            # A task or its machine failed; the others continue.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            line = f"failed: {tasks[finished[0]]}: {reason}"
        failed |= line.startswith("failed: ")
        print(line, flush=True)
    ray.shutdown()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
