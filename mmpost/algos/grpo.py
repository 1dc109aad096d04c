"""Group relative policy optimisation.

    A_i = (r_i - mean(r)) / std(r) inside the group of a prompt
    J   = 1/G sum_i 1/|o_i| sum_t min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL(pi || pi_ref)

with rho = pi / pi_old and eps = 0.2. The gradient of the minimum is rho A where the unclipped branch decides and 0
elsewhere, which is what the ``clip`` stabiliser says.

Source: "DeepSeekMath", arXiv 2402.03300, equations 3 and 4.
Differs: beta is 0 unless asked for (paper: 0.04; TRL: 0), and the penalty's default estimator is ``k2``, whose gradient
is that of KL(pi || pi_ref); ``loss.kl.kl=k3`` is the paper's. The standard deviation gets 1e-4 added, as in TRL.
"""

from mmpost.train.parts import Parts

GRPO = Parts(aggregate="seq_mean", denominator="old", advantage="group", stabilise=("clip",))
