"""k-NN classification beside scikit-learn's brute-force cosine k-NN, interleaved in one process.

    python benchmarks/knn.py                      # 50,000 x 384 training features, 10,000 to classify
    python benchmarks/knn.py --n-train 5000 --n-test 1000 --rounds 3

Prints the time of each round and the ratio of scikit-learn's time to ours, above 1 where ours is faster: median, smallest and largest round.
Both use the same number of threads; the predictions must agree.
"""
import time
import numpy as np, torch
from fastcore.script import call_parse
from sklearn.neighbors import KNeighborsClassifier
from self_supervised.evaluation.knn import knn_classifier

@call_parse
def main(
    n_train:int=50_000, # Training features
    n_test:int=10_000, # Features to classify
    dim:int=384, # Length of a feature
    n_classes:int=1000, # Classes
    k:int=20, # Neighbours
    T:float=.07, # Temperature
    rounds:int=5 # Rounds
):
    torch.manual_seed(0)
    centres = torch.randn(n_classes, dim)
    ytr,yte = torch.randint(0, n_classes, (n_train,)),torch.randint(0, n_classes, (n_test,))
    ftr,fte = centres[ytr]+2*torch.randn(n_train,dim),centres[yte]+2*torch.randn(n_test,dim)
    def ours(): return knn_classifier(ftr, ytr, fte, k, T, n_classes).argmax(1).numpy()
    def theirs():
        clf = KNeighborsClassifier(k, algorithm='brute', metric='cosine', weights=lambda d: np.exp((1-d)/T))
        return clf.fit(ftr.numpy(), ytr.numpy()).predict(fte.numpy())
    ratios = []
    for r in range(rounds):
        took,preds = {},{}
        for f in (ours,theirs)[::1 if r%2 else -1]:
            start = time.perf_counter()
            preds[f] = f()
            took[f] = time.perf_counter()-start
        ratios.append(took[theirs]/took[ours])
        print(f"round {r+1}: ours {took[ours]:.2f} s, scikit-learn {took[theirs]:.2f} s, ratio {ratios[-1]:.2f}, same prediction {np.mean(preds[ours]==preds[theirs]):.4f}", flush=True)
    print(f"ratio {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) on {torch.get_num_threads()} threads, {n_train}x{dim} against {n_test}, k={k}")
