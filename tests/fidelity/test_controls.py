import torch

from tve.fidelity.controls import centre_map, control_maps, random_map


def test_a_pictures_random_map_does_not_depend_on_the_batch_it_is_in() -> None:
    together = control_maps(["a", "b", "c"], 6, radius=1, seed=3)
    apart = control_maps(["c", "a"], 6, radius=1, seed=3)
    for name in ("random", "random_blurred"):
        assert together[name][2].equal(apart[name][0])
        assert together[name][0].equal(apart[name][1])


def test_pictures_and_seeds_have_random_maps_of_their_own() -> None:
    maps = [random_map("a", 6, 0), random_map("b", 6, 0), random_map("a", 6, 1)]
    assert all(not one.equal(other) for i, one in enumerate(maps) for other in maps[:i])


def test_random_maps_are_uniform_over_positions() -> None:
    mean = torch.stack([random_map(str(key), 4, 0) for key in range(2000)]).mean(0)
    torch.testing.assert_close(mean, torch.full((4, 4), 0.5), atol=0.03, rtol=0)


def test_the_blurred_control_is_the_mean_of_the_random_one_over_each_window() -> None:
    maps = control_maps(["a"], 5, radius=1, seed=0)
    random, blurred = maps["random"][0], maps["random_blurred"][0]
    torch.testing.assert_close(blurred[2, 3], random[1:4, 2:5].mean())
    torch.testing.assert_close(blurred[0, 4], random[0:2, 3:5].mean())


def test_the_centre_control_falls_with_the_distance_from_the_middle() -> None:
    centre = centre_map(7)
    assert centre.argmax() == 3 * 7 + 3
    assert centre.equal(centre.flip(0))
    assert centre.equal(centre.T)
    assert (centre[3, 3:].diff() < 0).all()
