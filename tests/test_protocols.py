from mimrefiner.probes import protocols


def test_protocols_have_the_names_of_committed_rows():
    assert protocols.KNN.name == "knn_k10_t0.07_standardized"
    assert protocols.WITHIN_KINDS.name == "within_kinds_knn_k10_t0.07_standardized"
    assert protocols.linear(195).name == "linear_195epochs"
    shots = (1, 2, 0.01, 0.1)
    names = [protocols.low_shot(shot).name for shot in shots]
    assert names == ["logistic_1shot", "logistic_2shot", "logistic_0.01", "logistic_0.1"]


def test_protocols_are_named_as_people_say_them():
    shown = [protocols.low_shot(shot).label for shot in (1, 5, 0.01, 0.1)]
    assert shown == ["1-shot", "5-shot", "1 %", "10 %"]
    titles = [protocols.low_shot(shot).title for shot in (1, 2, 0.01)]
    assert titles == [
        "low-shot: 1 image per class",
        "low-shot: 2 images per class",
        "low-shot: 1 % of the images",
    ]
    assert protocols.labels((protocols.KNN, protocols.linear(10), protocols.KMEANS)) == {
        "knn_k10_t0.07_standardized": "k-NN",
        "linear_10epochs": "linear probe",
        "kmeans": "k-means",
    }
