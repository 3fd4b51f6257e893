"""Every mistake a user can make with the arguments is answered by one clear sentence."""

import math

import pytest
import torch

from idml_fast import MemoryBank, Metric, nearest, paired, pairwise, rowstats
from idml_fast.losses import (
    ContrastiveLoss,
    FastAPLoss,
    IntrospectiveSoftmax,
    MarginLoss,
    MultiSimilarityLoss,
    NCALoss,
    NPairsLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SupConLoss,
    TripletMarginLoss,
    margin_loss,
    proxy_anchor_loss,
)
from idml_fast.stats import HingeSum, Histogram, LogSumExp, Sum

SEM, UNC, SEM2, UNC2 = (torch.ones(shape) for shape in [(4, 8), (4, 3), (6, 8), (6, 3)])
META = torch.device("meta")
LABELS, LABELS2 = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 0, 1, 2])
PROXIES = torch.ones(3, 8)
STATS = {"it": Sum(where="any")}
SETS = {"sem": SEM, "unc": UNC, "sem2": SEM2, "unc2": UNC2}


def pairs(**changes):
    return lambda: pairwise(**SETS | changes)


def stats(**changes):
    given = {**SETS, "labels": LABELS, "labels2": LABELS2, "stats": STATS}
    return lambda: rowstats(**given | changes)


def listed(**changes):
    given = {**SETS, "index": (torch.tensor([0, 1]), torch.tensor([5, 0]))}
    return lambda: paired(**given | changes)


def best(**changes):
    given = {**SETS, "k": 1, "labels": LABELS, "labels2": LABELS2, "where": "same"}
    return lambda: nearest(**given | changes)


def anchored(**changes):
    given = {"sem": SEM, "unc": UNC, "labels": LABELS, "proxies": PROXIES}
    return lambda: proxy_anchor_loss(**given | changes)


def anchors(*arguments, **changes):
    return lambda: ProxyAnchorLoss(*(arguments or (3, 8)), **changes)


# what is wrong: (the call, the error, its whole message)
MISTAKES = {
    # ------------------------------------------------------------------------------- the metric
    "tau a string": (
        lambda: Metric("5"),
        TypeError,
        "tau must be a number or a tensor without dimensions, got str",
    ),
    "tau a vector": (
        lambda: Metric(torch.tensor([5.0])),
        ValueError,
        "tau must be a number or a tensor without dimensions, got shape [1]",
    ),
    "tau an integer tensor": (
        lambda: Metric(torch.tensor(5)),
        TypeError,
        "tau must be of a floating dtype, got int64",
    ),
    "tau a bool": (
        lambda: Metric(True),
        TypeError,
        "tau must be a number or a tensor without dimensions, got bool",
    ),
    "tau None": (
        lambda: Metric(None),
        TypeError,
        "tau must be a number or a tensor without dimensions, got None",
    ),
    "tau a negative tensor": (
        lambda: Metric(torch.tensor(-1.5)),
        ValueError,
        "tau must be > 0, got -1.5",
    ),
    "tau on another device": (
        lambda: pairwise(SEM, UNC, metric=Metric(torch.tensor(5.0, device=META))),
        ValueError,
        "metric.tau must be on cpu like sem, got meta",
    ),
    "unc another string": (
        pairs(unc="none"),
        ValueError,
        "unc must be a torch.Tensor or 'zero', got 'none'",
    ),
    "tau zero": (lambda: Metric(0), ValueError, "tau must be > 0, got 0"),
    "tau negative": (lambda: Metric(-1.5), ValueError, "tau must be > 0, got -1.5"),
    "tau nan": (lambda: Metric(math.nan), ValueError, "tau must be > 0, got nan"),
    "gamma a string": (
        lambda: Metric(gamma="1"),
        TypeError,
        "gamma must be a number or a tensor without dimensions, got str",
    ),
    "gamma negative": (
        lambda: Metric(gamma=-1.0),
        ValueError,
        "gamma must be >= 0 and finite, got -1.0",
    ),
    "gamma infinite": (
        lambda: Metric(gamma=math.inf),
        ValueError,
        "gamma must be >= 0 and finite, got inf",
    ),
    "gamma nan": (
        lambda: Metric(gamma=math.nan),
        ValueError,
        "gamma must be >= 0 and finite, got nan",
    ),
    "form unknown": (
        lambda: Metric(form="euclidean"),
        ValueError,
        "form must be one of 'distance', 'cosine', 'official', got 'euclidean'",
    ),
    "form of the paper unknown": (
        lambda: Metric.paper("dot"),
        ValueError,
        "form must be one of 'distance', 'cosine', 'official', got 'dot'",
    ),
    # ------------------------------------------------------------------------------ types
    "metric a string": (
        pairs(metric="distance"),
        TypeError,
        "metric must be an idml_fast.Metric, got str",
    ),
    "metric the class": (
        pairs(metric=Metric),
        TypeError,
        "metric must be an idml_fast.Metric, got type",
    ),
    "sem a list": (pairs(sem=[[1.0]]), TypeError, "sem must be a torch.Tensor, got list"),
    "sem None": (pairs(sem=None), TypeError, "sem must be a torch.Tensor, got None"),
    "sem an array": (pairs(sem=SEM.numpy()), TypeError, "sem must be a torch.Tensor, got ndarray"),
    "unc a list": (pairs(unc=[1.0]), TypeError, "unc must be a torch.Tensor, got list"),
    "unc2 a number": (pairs(unc2=1.0), TypeError, "unc2 must be a torch.Tensor, got float"),
    "unc missing": (
        pairs(unc=None, unc2=None),
        TypeError,
        "unc must be a tensor because metric.tau is finite, got None",
    ),
    "unc missing, unc2 there": (
        pairs(unc=None, metric=Metric.plain()),
        TypeError,
        "unc must be given together with unc2, got None",
    ),
    "unc2 missing": (
        pairs(unc2=None),
        TypeError,
        "unc2 must be given together with unc, got None",
    ),
    "sem2 missing": (
        pairs(sem2=None),
        TypeError,
        "sem2 must be given together with unc2, got None",
    ),
    # ------------------------------------------------------------------------------ shapes
    "sem a vector": (
        pairs(sem=SEM[0]),
        ValueError,
        "sem must have shape [items, width], got [8]",
    ),
    "sem a batch of matrices": (
        pairs(sem=SEM[None]),
        ValueError,
        "sem must have shape [items, width], got [1, 4, 8]",
    ),
    "unc2 a vector": (
        pairs(unc2=UNC2[:, 0]),
        ValueError,
        "unc2 must have shape [items, width], got [6]",
    ),
    "unc a number per item": (
        pairs(unc=UNC.mean()),
        ValueError,
        "unc must have shape [items, width], got []",
    ),
    "sem without components": (
        pairs(sem=SEM[:, :0]),
        ValueError,
        "sem must have a width of at least 1, got [4, 0]",
    ),
    "unc of other items": (
        pairs(unc=UNC2),
        ValueError,
        "unc must have shape [4, Du] like sem [4, 8], got [6, 3]",
    ),
    "sem2 of another width": (
        pairs(sem2=SEM2[:, :7]),
        ValueError,
        "sem2 must have shape [M, 8] like sem [4, 8], got [6, 7]",
    ),
    "unc2 of another width": (
        pairs(unc2=UNC2[:, :2]),
        ValueError,
        "unc2 must have shape [6, 3] like sem2 and unc [6, 8], got [6, 2]",
    ),
    "unc2 of other items": (
        pairs(unc2=UNC),
        ValueError,
        "unc2 must have shape [6, 3] like sem2 and unc [6, 8], got [4, 3]",
    ),
    # ------------------------------------------------------------------- dtypes and devices
    "sem of integers": (
        pairs(sem=SEM.long()),
        TypeError,
        "sem must be float32, float64, bfloat16 or float16, got int64",
    ),
    "sem complex": (
        pairs(sem=SEM.cfloat()),
        TypeError,
        "sem must be float32, float64, bfloat16 or float16, got complex64",
    ),
    "sem of eight bits": (
        pairs(sem=SEM.to(torch.float8_e4m3fn)),
        TypeError,
        "sem must be float32, float64, bfloat16 or float16, got float8_e4m3fn",
    ),
    "unc of another dtype": (
        pairs(unc=UNC.double()),
        TypeError,
        "unc must be float32 like sem, got float64",
    ),
    "sem2 of another dtype": (
        pairs(sem2=SEM2.bfloat16()),
        TypeError,
        "sem2 must be float32 like sem, got bfloat16",
    ),
    "unc2 of integers": (
        pairs(unc2=UNC2.int()),
        TypeError,
        "unc2 must be float32 like sem, got int32",
    ),
    "unc on another device": (
        pairs(unc=UNC.to(META)),
        ValueError,
        "unc must be on cpu like sem, got meta",
    ),
    "sem2 on another device": (
        pairs(sem2=SEM2.to(META)),
        ValueError,
        "sem2 must be on cpu like sem, got meta",
    ),
    "unc2 on another device": (
        pairs(unc2=UNC2.to(META)),
        ValueError,
        "unc2 must be on cpu like sem, got meta",
    ),
    # ----------------------------------------------------------------------------- backends
    "backend unknown": (
        pairs(backend="gpu"),
        ValueError,
        "backend must be one of 'cuda', 'triton', 'cpu', 'reference', got 'gpu'",
    ),
    "backend for another device": (
        pairs(backend="cuda"),
        RuntimeError,
        "backend 'cuda' cannot serve pairwise here: it serves tensors on a GPU, not on cpu",
    ),
    "backend of rowstats unknown": (
        stats(backend="gpu"),
        ValueError,
        "backend must be one of 'cuda', 'triton', 'cpu', 'reference', got 'gpu'",
    ),
    "backend of paired without a kernel": (
        listed(backend="cuda"),
        RuntimeError,
        "backend 'cuda' cannot serve paired here: it has no kernel for this operation yet",
    ),
    # ----------------------------------------------------------------------------- rowstats
    "labels None": (stats(labels=None), TypeError, "labels must be a torch.Tensor, got None"),
    "labels a list": (
        stats(labels=[0, 1, 2, 0]),
        TypeError,
        "labels must be a torch.Tensor, got list",
    ),
    "labels of floats": (
        stats(labels=LABELS.float()),
        TypeError,
        "labels must be of an integer dtype, got float32",
    ),
    "labels of bools": (
        stats(labels=LABELS.bool()),
        TypeError,
        "labels must be of an integer dtype, got bool",
    ),
    "labels complex": (
        stats(labels=LABELS.cfloat()),
        TypeError,
        "labels must be of an integer dtype, got complex64",
    ),
    "labels too many": (
        stats(labels=LABELS2),
        ValueError,
        "labels must have shape [4] like sem [4, 8], got [6]",
    ),
    "labels a matrix": (
        stats(labels=LABELS[:, None]),
        ValueError,
        "labels must have shape [4] like sem [4, 8], got [4, 1]",
    ),
    "labels on another device": (
        stats(labels=LABELS.to(META)),
        ValueError,
        "labels must be on cpu like sem, got meta",
    ),
    "labels2 missing": (
        stats(labels2=None),
        TypeError,
        "labels2 must be a torch.Tensor, got None",
    ),
    "labels2 too few": (
        stats(labels2=LABELS),
        ValueError,
        "labels2 must have shape [6] like sem2 [6, 8], got [4]",
    ),
    "labels2 of floats": (
        stats(labels2=LABELS2.double()),
        TypeError,
        "labels2 must be of an integer dtype, got float64",
    ),
    "labels2 without sem2": (
        stats(sem2=None, unc2=None),
        TypeError,
        "sem2 must be given together with labels2, got None",
    ),
    "stats not a mapping": (
        stats(stats=[Sum(where="any")]),
        TypeError,
        "stats must be a mapping of names to idml_fast.stats, got list",
    ),
    "stats of something else": (
        stats(stats={"it": "sum"}),
        TypeError,
        "stats['it'] must be one of idml_fast.stats, got str",
    ),
    "stats of a class": (
        stats(stats={"it": Sum}),
        TypeError,
        "stats['it'] must be one of idml_fast.stats, got type",
    ),
    "threshold of other rows": (
        stats(stats={"it": HingeSum(where="any", threshold=torch.zeros(6))}),
        ValueError,
        "stats['it'].threshold must have shape [4] like sem [4, 8], got [6]",
    ),
    "threshold on another device": (
        stats(stats={"it": HingeSum(where="any", threshold=torch.zeros(4, device=META))}),
        ValueError,
        "stats['it'].threshold must be on cpu like sem, got meta",
    ),
    "threshold complex": (
        stats(stats={"it": HingeSum(where="any", threshold=torch.zeros(4).cfloat())}),
        TypeError,
        "stats['it'].threshold must be of a real dtype, got complex64",
    ),
    "sem wrong, of rowstats": (
        stats(sem=SEM[0]),
        ValueError,
        "sem must have shape [items, width], got [8]",
    ),
    # --------------------------------------------------------------------------- statistics
    "where unknown": (
        lambda: Sum(where="positive"),
        ValueError,
        "where must be one of 'same', 'different', 'any', got 'positive'",
    ),
    "power zero": (
        lambda: Sum(where="any", power=0),
        ValueError,
        "power must be > 0 and finite, got 0",
    ),
    "power a string": (
        lambda: Sum(where="any", power="2"),
        TypeError,
        "power must be a number, got str",
    ),
    "scale a string": (
        lambda: LogSumExp(where="any", scale="2"),
        TypeError,
        "scale must be a number, got str",
    ),
    "shift nan": (
        lambda: LogSumExp(where="any", shift=math.nan),
        ValueError,
        "shift must be finite, got nan",
    ),
    "threshold a string": (
        lambda: HingeSum(where="any", threshold="2"),
        TypeError,
        "threshold must be a number or a tensor, got str",
    ),
    "threshold infinite": (
        lambda: HingeSum(where="any", threshold=math.inf),
        ValueError,
        "threshold must be finite, got inf",
    ),
    "scale of a hinge None": (
        lambda: HingeSum(where="any", scale=None),
        TypeError,
        "scale must be a number, got None",
    ),
    "histogram without end": (
        lambda: Histogram(where="any", low=0.0, high=math.inf, bins=4),
        ValueError,
        "high must be finite, got inf",
    ),
    "histogram upside down": (
        lambda: Histogram(where="any", low=1.0, high=0.0, bins=4),
        ValueError,
        "high must be > low = 1.0, got 0.0",
    ),
    "histogram low a string": (
        lambda: Histogram(where="any", low="0", high=1.0, bins=4),
        TypeError,
        "low must be a number, got str",
    ),
    "histogram without bins": (
        lambda: Histogram(where="any", low=0.0, high=1.0, bins=0),
        ValueError,
        "bins must be >= 1, got 0",
    ),
    "histogram bins a float": (
        lambda: Histogram(where="any", low=0.0, high=1.0, bins=4.0),
        TypeError,
        "bins must be an integer, got float",
    ),
    # ------------------------------------------------------------------------------- paired
    "index a list": (
        listed(index=[torch.tensor([0]), torch.tensor([0])]),
        TypeError,
        "index must be a pair (rows, cols) of tensors, got list",
    ),
    "index one tensor": (
        listed(index=torch.tensor([[0], [0]])),
        TypeError,
        "index must be a pair (rows, cols) of tensors, got Tensor",
    ),
    "index rows a list": (
        listed(index=([0], torch.tensor([0]))),
        TypeError,
        "index rows must be a torch.Tensor, got list",
    ),
    "index of two lengths": (
        listed(index=(torch.tensor([0, 1]), torch.tensor([0]))),
        ValueError,
        "index cols must have shape [T], the same for both, got [1]",
    ),
    "index a matrix": (
        listed(index=(torch.zeros(2, 2).long(), torch.zeros(2, 2).long())),
        ValueError,
        "index rows must have shape [T], the same for both, got [2, 2]",
    ),
    "index of int32": (
        listed(index=(torch.tensor([0]).int(), torch.tensor([0]))),
        TypeError,
        "index rows must be int64, got int32",
    ),
    "index of floats": (
        listed(index=(torch.tensor([0]), torch.tensor([0.0]))),
        TypeError,
        "index cols must be int64, got float32",
    ),
    "index beyond the rows": (
        listed(index=(torch.tensor([0, 4]), torch.tensor([0, 0]))),
        ValueError,
        "index rows must be in [0, 4), got values from 0 to 4",
    ),
    "index beyond the columns": (
        listed(index=(torch.tensor([0, 3]), torch.tensor([0, 6]))),
        ValueError,
        "index cols must be in [0, 6), got values from 0 to 6",
    ),
    "index negative": (
        listed(index=(torch.tensor([0, -1]), torch.tensor([0, 0]))),
        ValueError,
        "index rows must be in [0, 4), got values from -1 to 0",
    ),
    "no index and other lengths": (
        listed(index=None),
        ValueError,
        "sem2 must have 4 rows like sem when index is None, got 6",
    ),
    "no index and no sem2": (
        listed(index=None, sem2=None, unc2=None),
        TypeError,
        "sem2 must be given when index is None, got None",
    ),
    # ------------------------------------------------------------------------------ nearest
    "k zero": (best(k=0), ValueError, "k must be >= 1, got 0"),
    "k negative": (best(k=-2), ValueError, "k must be >= 1, got -2"),
    "k a float": (best(k=2.0), TypeError, "k must be an integer, got float"),
    "k a bool": (best(k=True), TypeError, "k must be an integer, got bool"),
    "where of nearest unknown": (
        best(where="other"),
        ValueError,
        "where must be one of 'same', 'different', 'any', got 'other'",
    ),
    "nearest without labels": (
        best(labels=None),
        TypeError,
        "labels must be a torch.Tensor, got None",
    ),
    "nearest without labels2": (
        best(labels2=None),
        TypeError,
        "labels2 must be a torch.Tensor, got None",
    ),
    "nearest with labels of floats": (
        best(labels=LABELS.float()),
        TypeError,
        "labels must be of an integer dtype, got float32",
    ),
    "nearest with labels2 and without sem2": (
        best(sem2=None, unc2=None),
        TypeError,
        "sem2 must be given together with labels2, got None",
    ),
    "nearest leaving out itself among others": (
        best(exclude_self=True),
        ValueError,
        "exclude_self must be False with sem2: its columns are other items",
    ),
    "above a number": (best(above=0.5), TypeError, "above must be a torch.Tensor, got float"),
    "above of other rows": (
        best(above=torch.zeros(6)),
        ValueError,
        "above must have shape [4] like sem [4, 8], got [6]",
    ),
    "above on another device": (
        best(above=torch.zeros(4, device=META)),
        ValueError,
        "above must be on cpu like sem, got meta",
    ),
    "above of bools": (
        best(above=LABELS.bool()),
        TypeError,
        "above must be of a real dtype, got bool",
    ),
    # ------------------------------------------------------------------------------- losses
    "loss of a distance": (
        anchored(metric=Metric()),
        ValueError,
        "metric must be of form 'cosine' or 'official' for the Proxy-Anchor loss, got 'distance'",
    ),
    "loss of a string": (
        anchored(metric="cosine"),
        TypeError,
        "metric must be an idml_fast.Metric, got str",
    ),
    "label beyond the classes": (
        anchored(labels=LABELS + 1),
        ValueError,
        "labels must be in [0, 3), got values from 1 to 3",
    ),
    "label negative": (
        anchored(labels=LABELS - 1),
        ValueError,
        "labels must be in [0, 3), got values from -1 to 1",
    ),
    "loss with labels of floats": (
        anchored(labels=LABELS.float()),
        TypeError,
        "labels must be of an integer dtype, got float32",
    ),
    "loss with too many labels": (
        anchored(labels=LABELS2),
        ValueError,
        "labels must have shape [4] like sem [4, 8], got [6]",
    ),
    "loss without labels": (
        anchored(labels=None),
        TypeError,
        "labels must be a torch.Tensor, got None",
    ),
    "loss without proxies": (
        anchored(proxies=None),
        TypeError,
        "proxies must be a torch.Tensor, got None",
    ),
    "loss without sem": (anchored(sem=None), TypeError, "sem must be a torch.Tensor, got None"),
    "loss without unc": (
        anchored(unc=None),
        TypeError,
        "unc must be a tensor because metric.tau is finite, got None",
    ),
    "loss with a list for unc": (
        anchored(unc=[1.0]),
        TypeError,
        "unc must be a torch.Tensor, got list",
    ),
    "proxies of another width": (
        anchored(proxies=torch.ones(3, 7)),
        ValueError,
        "proxies must have shape [C, 8] like sem [4, 8], got [3, 7]",
    ),
    "proxy uncertainties of another width": (
        anchored(proxies_unc=torch.ones(3, 2)),
        ValueError,
        "proxies_unc must have shape [3, 3] like proxies and unc [3, 8], got [3, 2]",
    ),
    "proxies a vector": (
        anchored(proxies=PROXIES[0]),
        ValueError,
        "proxies must have shape [items, width], got [8]",
    ),
    "proxies on another device": (
        anchored(proxies=PROXIES.to(META)),
        ValueError,
        "proxies must be on cpu like sem, got meta",
    ),
    "proxies of another dtype": (
        anchored(proxies=PROXIES.double()),
        TypeError,
        "proxies must be float32 like sem, got float64",
    ),
    "margin nan": (anchored(margin=math.nan), ValueError, "margin must be finite, got nan"),
    "margin a string": (anchored(margin="0.1"), TypeError, "margin must be a number, got str"),
    "alpha zero": (anchored(alpha=0.0), ValueError, "alpha must be > 0 and finite, got 0.0"),
    "num_classes zero": (anchors(0, 8), ValueError, "num_classes must be >= 1, got 0"),
    "num_classes a float": (
        anchors(3.0, 8),
        TypeError,
        "num_classes must be an integer, got float",
    ),
    "sem_dim zero": (anchors(3, 0), ValueError, "sem_dim must be >= 1, got 0"),
    "unc_dim zero": (anchors(3, 8, 0), ValueError, "unc_dim must be >= 1, got 0"),
    "proxy_unc unknown": (
        anchors(proxy_unc="one"),
        ValueError,
        "proxy_unc must be one of 'zero', 'learned', got 'one'",
    ),
    "module of a distance": (
        anchors(metric=Metric()),
        ValueError,
        "metric must be of form 'cosine' or 'official' for the Proxy-Anchor loss, got 'distance'",
    ),
    "module with margin nan": (
        anchors(margin=math.nan),
        ValueError,
        "margin must be finite, got nan",
    ),
    "module with alpha negative": (
        anchors(alpha=-1.0),
        ValueError,
        "alpha must be > 0 and finite, got -1.0",
    ),
    "module with sem of another width": (
        lambda: ProxyAnchorLoss(3, 7)(SEM, UNC, LABELS),
        ValueError,
        "proxies must have shape [C, 8] like sem [4, 8], got [3, 7]",
    ),
    "a setting that no loss has": (
        lambda: ProxyAnchorLoss(3, 7, alhpa=2.0),
        TypeError,
        "ProxyAnchorLoss got an unexpected keyword argument 'alhpa'",
    ),
    "proxies and a certain item": (
        anchored(sem2=SEM2, unc2="zero", labels2=LABELS2),
        TypeError,
        "unc2 must be a torch.Tensor like unc, got 'zero'",
    ),
    "proxies and columns without labels": (
        anchored(sem2=SEM2, unc2=UNC2),
        TypeError,
        "labels2 must be a torch.Tensor, got None",
    ),
    "neg_margin a string": (
        lambda: ContrastiveLoss(neg_margin="1"),
        TypeError,
        "neg_margin must be a number, got str",
    ),
    "pos_margin infinite": (
        lambda: ContrastiveLoss(pos_margin=math.inf),
        ValueError,
        "pos_margin must be finite, got inf",
    ),
    "contrastive of no metric": (
        lambda: ContrastiveLoss(metric=None),
        TypeError,
        "metric must be an idml_fast.Metric, got None",
    ),
    "beta of the multi-similarity zero": (
        lambda: MultiSimilarityLoss(beta=0),
        ValueError,
        "beta must be > 0 and finite, got 0",
    ),
    "base nan": (
        lambda: MultiSimilarityLoss(base=math.nan),
        ValueError,
        "base must be finite, got nan",
    ),
    "epsilon a string": (
        lambda: MultiSimilarityLoss(epsilon="0.1"),
        TypeError,
        "epsilon must be a number or None, got str",
    ),
    "mining unknown": (
        lambda: TripletMarginLoss(mining="easy"),
        ValueError,
        "mining must be one of 'all', 'hard', 'semihard', 'semihard_all', got 'easy'",
    ),
    "triplets with columns without unc2": (
        lambda: TripletMarginLoss()(SEM, UNC, LABELS, SEM2, None, LABELS2),
        TypeError,
        "unc2 must be given together with unc, got None",
    ),
    "sampling unknown": (
        lambda: MarginLoss(sampling="random"),
        ValueError,
        "sampling must be one of 'all', 'distance_weighted', got 'random'",
    ),
    "beta nan": (lambda: MarginLoss(beta=math.nan), ValueError, "beta must be finite, got nan"),
    "beta a matrix": (
        lambda: margin_loss(SEM, UNC, LABELS, beta=torch.ones(2, 2)),
        ValueError,
        "beta must have shape [], [1] or [classes], got [2, 2]",
    ),
    "beta of integers": (
        lambda: margin_loss(SEM, UNC, LABELS, beta=torch.tensor(1)),
        TypeError,
        "beta must be of a floating dtype, got int64",
    ),
    "beta on another device": (
        lambda: margin_loss(SEM, UNC, LABELS, beta=torch.ones(3, device=META)),
        ValueError,
        "beta must be on cpu like labels, got meta",
    ),
    "label beyond the betas": (
        lambda: MarginLoss(num_classes=2, learn_beta=True)(SEM, UNC, LABELS),
        ValueError,
        "labels must be in [0, 2), got values from 0 to 2",
    ),
    "classes of the betas zero": (
        lambda: MarginLoss(num_classes=0),
        ValueError,
        "num_classes must be >= 1, got 0",
    ),
    "bins zero": (lambda: FastAPLoss(num_bins=0), ValueError, "num_bins must be >= 1, got 0"),
    "FastAP of cosines": (
        lambda: FastAPLoss(metric=Metric.paper("cosine")),
        ValueError,
        "metric must be of form 'distance' for FastAP, got 'cosine'",
    ),
    "temperature zero": (
        lambda: NTXentLoss(temperature=0.0),
        ValueError,
        "temperature must be > 0 and finite, got 0.0",
    ),
    "temperature negative": (
        lambda: SupConLoss(temperature=-0.1),
        ValueError,
        "temperature must be > 0 and finite, got -0.1",
    ),
    "softmax_scale infinite": (
        lambda: NCALoss(softmax_scale=math.inf),
        ValueError,
        "softmax_scale must be > 0 and finite, got inf",
    ),
    "power of Proxy-NCA zero": (
        lambda: ProxyNCALoss(3, 8, power=0.0),
        ValueError,
        "power must be > 0 and finite, got 0.0",
    ),
    "n-pairs with labels of floats": (
        lambda: NPairsLoss()(SEM, UNC, LABELS.float()),
        TypeError,
        "labels must be of an integer dtype, got float32",
    ),
    "softmax of a distance": (
        lambda: IntrospectiveSoftmax(3, 8, metric=Metric()),
        ValueError,
        "metric must be of form 'cosine' or 'official' for the introspective softmax, "
        "got 'distance'",
    ),
    "class beyond those of the softmax": (
        lambda: IntrospectiveSoftmax(2, 8)(SEM, UNC, LABELS),
        ValueError,
        "labels must be in [0, 2), got values from 0 to 2",
    ),
    "logits in training without unc": (
        lambda: IntrospectiveSoftmax(3, 8).logits(SEM),
        TypeError,
        "unc must be a tensor because metric.tau is finite, got None",
    ),
    # ------------------------------------------------------------------------------- the bank
    "bank of size zero": (
        lambda: MemoryBank(0, 8),
        ValueError,
        "size must be >= 1, got 0",
    ),
    "bank of no width": (lambda: MemoryBank(4, 8, 0), ValueError, "unc_dim must be >= 1, got 0"),
    "bank with a float": (
        lambda: MemoryBank(4.0, 8),
        TypeError,
        "size must be an integer, got float",
    ),
    "sem of another width than the bank": (
        lambda: MemoryBank(4, 7, 3).add(SEM, UNC, LABELS),
        ValueError,
        "sem must have shape [N, 7] like the bank's, got [4, 8]",
    ),
    "unc of another length than sem": (
        lambda: MemoryBank(4, 8, 3).add(SEM, UNC2, LABELS),
        ValueError,
        "unc must have shape [4, 3] like the bank's, got [6, 3]",
    ),
    "a bank without its unc": (
        lambda: MemoryBank(4, 8, 3).add(SEM, None, LABELS),
        TypeError,
        "unc must be a torch.Tensor, got None",
    ),
    "a bank on another device": (
        lambda: MemoryBank(4, 8, 3, device=META).add(SEM, UNC, LABELS),
        ValueError,
        "sem must be on meta like the bank, got cpu",
    ),
    "a bank with labels of floats": (
        lambda: MemoryBank(4, 8, 3).add(SEM, UNC, LABELS.float()),
        TypeError,
        "labels must be of an integer dtype, got float32",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_by_one_clear_sentence(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert str(raised.value) == message


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_same_mistake_has_the_same_answer_on_every_backend(backend):
    with pytest.raises(ValueError, match=r"^unc must have shape \[4, Du\] like sem \[4, 8\]"):
        pairwise(SEM, UNC2, backend=backend)


@pytest.mark.parametrize("call", [stats, best], ids=["rowstats", "nearest"])
def test_mistakes_are_found_before_anything_is_computed(call, monkeypatch):
    def kernel(*arguments):
        raise AssertionError("the kernel ran")

    monkeypatch.setattr("idml_fast._cpu.pairwise.forward", kernel)
    with pytest.raises(TypeError, match=r"^labels must be of an integer dtype"):
        call(labels=LABELS.float())()


def test_widths_of_sem_and_unc_may_differ():
    assert pairwise(**SETS).shape == (4, 6)


def test_empty_inputs_are_no_mistake():
    assert pairwise(SEM[:0], UNC[:0], SEM2, UNC2).shape == (0, 6)
    assert proxy_anchor_loss(SEM[:0], UNC[:0], LABELS[:0], proxies=PROXIES) == 0
