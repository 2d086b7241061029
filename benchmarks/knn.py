"""k-NN classification, compared with scikit-learn's brute-force cosine k-NN, and the protocol written out plainly

    python -m benchmarks.knn                      # 50,000 x 384 training features, 10,000 to classify
    python -m benchmarks.knn --n-train 5000 --n-test 1000 --rounds 3

All use the same number of threads, scikit-learn on a CPU alone; the predictions must agree but for one in a thousand.
"""
import numpy as np, torch
from self_supervised.evaluation.knn import knn_classifier
from . import plain
from .race import main, race, rows_of

def rows(
    n_train:int=50_000, # Training features
    n_test:int=10_000, # Features to classify
    dim:int=384, # Length of a feature
    n_classes:int=1000, # Classes
    k:int=20, # Neighbours
    T:float=.07, # Temperature
    rounds:int=5, # Rounds
    device:str='cpu' # Where
):
    torch.manual_seed(0)
    centres = torch.randn(n_classes, dim)
    ytr,yte = torch.randint(0, n_classes, (n_train,)),torch.randint(0, n_classes, (n_test,))
    ftr,fte = centres[ytr]+2*torch.randn(n_train,dim),centres[yte]+2*torch.randn(n_test,dim)
    ftr,fte,ytr = ftr.to(device),fte.to(device),ytr.to(device)
    def sklearn():
        from sklearn.neighbors import KNeighborsClassifier
        clf = KNeighborsClassifier(k, algorithm='brute', metric='cosine', weights=lambda d: np.exp((1-d)/T))
        return torch.as_tensor(clf.fit(ftr.numpy(), ytr.numpy()).predict(fte.numpy()))
    cs = dict(ours=lambda: knn_classifier(ftr, ytr, fte, k, T, n_classes).argmax(1), plain=lambda: plain.knn(ftr, ytr, fte, k, T, n_classes).argmax(1))
    if device=='cpu': cs['scikit-learn'] = sklearn
    preds   = {c: f().cpu() for c,f in cs.items()}
    differs = {c: (p!=preds['ours']).double().mean().item() for c,p in preds.items()}
    if max(differs.values())>1e-3: raise ValueError(f"predictions differ in parts of {differs}: their times cannot be compared")
    return rows_of(f"{n_train}x{dim} against {n_test}, k={k}, {n_classes} classes", race(cs, rounds, device, least=0), differs=differs)

if __name__=='__main__': main(rows, __doc__)
