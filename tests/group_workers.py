"""What processes of a group run in the tests; a module of its own, because they import it before
anything else.
"""

import torch

import mimrefiner as mr


def extract(rank, world, rendezvous, out):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    encoder = mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2))
    features = mr.extract_features(
        encoder, mr.load_dataset("digits", split="test").subset(range(7)), batch_size=2
    )
    torch.save({"x": features.x, "y": features.y}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()
