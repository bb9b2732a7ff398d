"""Refinement on SLURM: one task per GPU; before its time limit it saves and is queued again.

    pip install submitit
    python examples/slurm_submitit.py --nodes 4 --gpus 8 --partition gpu -- \
        --model WEIGHTS.safetensors --data imagefolder:IMAGENET --preset paper-mae-l16 --workers 10
        --out RUN

What stands behind ``--`` goes to ``mimrefiner refine``. SLURM is asked for SIGTERM some minutes
before the end (``--signal``): training then saves and stops, and the job goes back into the queue,
where it later goes on from its newest checkpoint.
"""

import argparse
import os
import subprocess
import sys


class Refine:
    """The work of one task; submitit calls it in every process."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments

    def __call__(self) -> int:
        import submitit

        from mimrefiner.__main__ import main

        # Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; every process sees all
        # GPUs and takes that of its LOCAL_RANK
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        status = main(["refine", *self.arguments, "--resume"])
        if status == 143 and os.environ["RANK"] == "0":  # stopped by SIGTERM, state saved
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        if status not in (0, 143):
            # Without an error the job would count as done
            raise RuntimeError(
                f"mimrefiner refine ended with status {status}: the lines above say why"
            )
        return status


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="per node")
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--partition")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, refine = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    import submitit

    executor = submitit.AutoExecutor(folder="slurm_logs")
    executor.update_parameters(
        name="mimrefiner",
        nodes=args.nodes,
        gpus_per_node=args.gpus,
        tasks_per_node=args.gpus,
        cpus_per_task=12,
        timeout_min=60 * args.hours,
        slurm_partition=args.partition,
        slurm_additional_parameters={"signal": "TERM@300"},
        slurm_srun_args=["--kill-on-bad-exit=1"],  # one task's failure ends the others
    )
    print(executor.submit(Refine(refine)).job_id)


if __name__ == "__main__":
    main()
