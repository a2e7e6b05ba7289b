def test_x(scene):
    t=scene.target
    for v,row in enumerate(t.source_scores(scene.opinions)):
        s=[t.local_score(v),*row]; print(v,[(round(x.c_index,2),round(x.se,2)) for x in s])
    print(t.prior(scene.opinions, scene.study.router))
    assert 0
