"""jaxopt: `optax.chain(autoclip(), ...)` in its `OptaxSolver`; the history is in the solver's state."""

import jax
import jaxopt
import optax
from checks import HALF, PERCENTILE
from harness import autoclip, batch_of, loss_of, make_params, play, steps


def train(folder, *, resume):
    params = make_params()
    # page
    tx = optax.chain(autoclip(PERCENTILE), optax.adam(1e-2))
    solver = jaxopt.OptaxSolver(loss_of, tx)
    # end of page
    state = solver.init_state(params, batch_of(0))
    update = jax.jit(solver.update)
    kept = steps(lambda kept, batch: tuple(update(*kept, batch)), (params, state), folder, resume=resume)
    return int(kept[1].iter_num) - HALF * resume, kept[0], kept[1].internal_state


if __name__ == "__main__":
    play("jaxopt", train)
