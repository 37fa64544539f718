# One image for all three roles; which one a container is, its command says.
#
#   docker build -t easyspec .                                                                    # CPU
#   docker build -t easyspec:cuda --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 .   # NVIDIA
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim

FROM ${PYTHON_IMAGE} AS library
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
 && python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir "setuptools>=77"
WORKDIR /src
COPY pyproject.toml setup.py ./
COPY easyspec/ops/cpp easyspec/ops/cpp
RUN /opt/venv/bin/python setup.py build_ext --inplace && test -f easyspec/ops/libeasyspec.so

FROM ${PYTHON_IMAGE} AS build
# Where torch comes from: its CPU wheels are a tenth of the CUDA ones. Empty: wherever pip finds it.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /src
# The dependencies alone first: this layer is rebuilt when they change, not when the source does.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
      print(*project["dependencies"], *project["optional-dependencies"]["tracing"], sep="\n")' > requirements.txt \
 && /opt/venv/bin/pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
      -c constraints.txt -r requirements.txt \
 # Headers and test suites are for building extensions, and there is no compiler in the final image.
 && rm -rf /opt/venv/lib/python3*/site-packages/torch/include /opt/venv/lib/python3*/site-packages/torch/test \
 && find /opt/venv -type d -name tests -path '*/site-packages/*' -prune -exec rm -rf {} + \
 && /opt/venv/bin/pip uninstall --quiet --yes pip
COPY easyspec easyspec
COPY --from=library /src/easyspec/ops/libeasyspec.so easyspec/ops/
COPY drafter_service drafter_service
COPY verifier_service verifier_service
COPY gateway gateway
COPY models/base models/base
COPY models/base-small models/base-small
COPY models/draft models/draft
COPY models/smollm2-draft models/smollm2-draft
# The root file system is read-only when it runs: what Python would compile then is compiled now.
RUN rm -r easyspec/ops/cpp && python -m compileall -q /src \
 && printf '%s\n' '#!/opt/venv/bin/python' 'from easyspec.cli.main import main' 'main()' > /opt/venv/bin/easyspec \
 && chmod +x /opt/venv/bin/easyspec

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="easyspec" \
      org.opencontainers.image.description="Speculative-decoding inference service: gateway, drafter, verifier"
# A fixed number, so that a volume's owner can be set to it from outside.
RUN groupadd --gid 10001 easyspec \
 && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin easyspec \
 && install -d -o easyspec -g easyspec /cache
COPY --from=build /opt/venv /opt/venv
COPY --from=build /src /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor
WORKDIR /app
USER 10001:10001
VOLUME /cache
# gateway: REST, gRPC; drafter; verifier
EXPOSE 8000 50051 50052 50053
CMD ["easyspec", "--help"]
