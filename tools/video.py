"""Score the masks that `dino_eval video --masks-out MASKS/SIZE` wrote, one row per sequence in a JSON-lines file

    dino_eval video --encoder vit_s.safetensors --data DAVIS --size 480 --masks-out masks/480
    python tools/video.py DAVIS masks nbs/experiments/runs/davis/runs.jsonl

Sequences of which not all masks are written, and those that have a row, are left out: the second command may be repeated while the first one runs.
"""
import json, sys
from pathlib import Path
import torch
from self_supervised.evaluation.video import davis_sequences, read_mask, video_scores

def main(data, masks, out):
    out  = Path(out)
    done = {(o['size'],o['sequence']) for o in map(json.loads, out.read_text().splitlines())} if out.exists() else set()
    out.parent.mkdir(parents=True, exist_ok=True)
    for name,(frames,files) in davis_sequences(data).items():
        for size in sorted(Path(masks).iterdir(), key=lambda o: int(o.name)):
            pred = [size/name/f.name for f in files]
            if (int(size.name),name) in done or not all(f.exists() for f in pred): continue
            s = video_scores(*(torch.stack([read_mask(f) for f in fs]) for fs in (pred,files))).mean()
            row = dict(size=int(size.name), sequence=name, frames=len(frames)) | {k: round(100*v, 2) for k,v in s.items()}
            with open(out, 'a') as f: f.write(json.dumps(row)+'\n')

if __name__=='__main__':
    if len(sys.argv)!=4: sys.exit(__doc__)
    main(*sys.argv[1:])
