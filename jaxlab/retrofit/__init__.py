"""Retrofit: dense models turned into models with Native Sparse Attention, and what that costs them."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.retrofit.convert import GATE, retrofit, retrofitted
    from jaxlab.retrofit.coverage import Coverage, attention_coverage
    from jaxlab.retrofit.measure import describe_retrofit, mean_loss, measure_retrofit
