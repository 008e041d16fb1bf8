"""Residual-attention vision transformer.

Y. Lin, "Research on Vision Transformer Facial Expression Recognition Algorithm Based on Residual Attention Network",
Academic Journal of Computing and Information Science 8(6), 2025, 13-18. In the paper's order: ResNet-50, residual
attention on its last two maps, deconvolution and fusion, efficient multi-scale attention, convolution with dropout,
transformer. What the paper leaves open follows TransFER (arXiv 2108.11116). 83,509,367 parameters at 7 classes. The
"multi-scale dilated convolution" its section 3.1 speaks of once, with neither rates nor a place, is not built.

With ``detection`` the patch tokens also find faces, as the paper's figure 3 shows them: ten anchor shapes, five loss
terms. The paper says no more about it; the rest is a one-level detector in the manner of YOLO (`fer.models.detection`).
910,456 parameters more.
"""

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from fer.errors import UserError
from fer.layers.anchors import anchor_shapes
from fer.layers.ema_attention import EMAttention
from fer.layers.local_attention import ResidualAttention
from fer.layers.score_attention import ResidualScoreEncoder
from fer.models.base import Batch
from fer.models.detection import DetectionHead, DetectionLoss, DetectorOptions, FaceDetector, Faces, KnownFaces
from fer.models.pretrained import timm_network

VIT = "vit_base_patch16_224.augreg_in1k"
VIT_BLOCKS, VIT_DIM = 8, 768


class ResAttnViTNetwork(nn.Module):
    """The whole network.

    Args:
        backbone: A timm network giving its last two maps, (B, C4, H/16, W/16) and (B, C5, H/32, W/32).
        encoder: (B, 1 + N, dim) -> (B, 1 + N, dim).
        num_classes: Size of the output.
        grid: Side of the map at a 16th of the image: 14 at 224 pixels.
        branches: Local attention maps per level; 0 leaves the residual attention out, its channel gate included.
        ema: Put EMA attention on the fused map.
        residual: X * (1 + M) instead of X * M.
        mad_p: Multi-attention dropping, see `LocalAttention`.
        width: Channels of the fused map.
        dim: Of the tokens.
        hidden: Of the head.
        dropout: After the convolution, and before the classifier.

    Attributes:
        detection: Finds faces in the patch tokens, or None; plays no part in the image's logits.
    """

    def __init__(
        self,
        backbone: Any,
        encoder: nn.Module,
        num_classes: int,
        grid: int,
        branches: int,
        ema: bool,
        residual: bool,
        mad_p: float,
        width: int,
        dim: int,
        hidden: int,
        dropout: tuple[float, float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        fine, coarse = backbone.feature_info.channels()
        self.fine_attention, self.coarse_attention = (
            ResidualAttention(channels, branches, residual, mad_p) if branches else nn.Identity()
            for channels in (fine, coarse)
        )
        self.lateral = nn.Conv2d(fine, width, 1)
        self.deconvolution = nn.Sequential(
            nn.Conv2d(coarse, width, 1), nn.ConvTranspose2d(width, width, kernel_size=4, stride=2, padding=1)
        )
        self.ema = EMAttention(width) if ema else nn.Identity()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout[0])
        )
        self.tokens = nn.Conv2d(width, dim, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, 1 + grid * grid, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.classifier = nn.Sequential(nn.Dropout(dropout[1]), nn.Linear(hidden, num_classes))
        self.detection: DetectionHead | None = None

    def forward_map(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> the fused local map (B, width, H/16, W/16)."""
        fine, coarse = self.backbone(image)
        fused = self.lateral(self.fine_attention(fine)) + self.deconvolution(self.coarse_attention(coarse))
        result: Tensor = self.conv(self.ema(fused))
        return result

    def forward_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> encoded tokens (B, 1 + N, dim), the class token first."""
        tokens = self.tokens(self.forward_map(image)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        encoded: Tensor = self.encoder(tokens + self.position)
        return encoded

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, hidden)."""
        features: Tensor = self.head(self.forward_tokens(image)[:, 0])
        return features

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.forward_features(image))
        return logits

    def forward_both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> logits (B, num_classes) and raw detections (B, N, num_classes + 5)."""
        assert self.detection is not None
        tokens = self.forward_tokens(image)
        return self.classifier(self.head(tokens[:, 0])), self.detection(tokens[:, 1:])


class ResAttnViT(FaceDetector):
    """`ResAttnViTNetwork` on the bench.

    Args:
        backbone: Any timm network with maps at a 16th and a 32nd of the image.
        pretrained: Start from published weights where there are any, or from a file's, see `timm_network`.
        encoder: ``residual``: ``depth`` layers with carried scores, random weights; ``plain``: the same layers, each
            with scores of its own; ``vit_b8``: the first eight blocks of timm's ViT-Base, whose own shape and weights
            replace ``dim``, ``depth``, ``heads`` and ``mlp_ratio``.
        branches: As in `ResAttnViTNetwork`, and so are the next six.
        ema: EMA attention.
        residual: Form of the local attention.
        mad_p: Multi-attention dropping.
        width: Channels of the fused map.
        dim: Of the tokens.
        hidden: Of the head.
        depth: Layers of the encoder.
        heads: Of its attention.
        mlp_ratio: Hidden over token width in its perceptrons.
        conv_dropout: After the convolution.
        dropout: Before the classifier.
        backbone_lr: Learning rate of the backbone over the recipe's.
        detection_grid: Cells of a side that predict faces; None: one per token; 1: the paper's literal 1x1x1024 tensor,
            for images of one face.
        anchors: Pairs of width and height in pixels of the input, or how many to find in the training part.
        detection_loss: Loss of the faces; an image whose faces all show one expression adds the injected loss.
        duplicate_iou: Overlap from which on the less confident of two faces is dropped.
        max_faces: Faces kept of an image.
        options: See `DetectorOptions`.

    Raises:
        UserError: The image is not a multiple of 32 pixels, or anchors are wanted and were not looked for.
    """

    network: ResAttnViTNetwork

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str,
        encoder: Literal["residual", "plain", "vit_b8"],
        branches: int,
        ema: bool,
        residual: bool,
        mad_p: float,
        width: int,
        dim: int,
        hidden: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        conv_dropout: float,
        dropout: float,
        backbone_lr: float,
        detection_grid: int | None,
        anchors: int | list[list[float]],
        detection_loss: DetectionLoss,
        duplicate_iou: float,
        max_faces: int,
        **options: Unpack[DetectorOptions],
    ) -> None:
        super().__init__(**options)
        if self.image_size % 32:
            raise UserError(f"model=resattn_vit needs model.image_size to be a multiple of 32, got {self.image_size}")
        local, self.weights = timm_network(backbone, pretrained, {"features_only": True, "out_indices": (-2, -1)})
        if encoder == "vit_b8":
            vit, source = timm_network(VIT, bool(pretrained), {"num_classes": 0})
            layers: nn.Module = nn.Sequential(*vit.blocks[:VIT_BLOCKS], nn.LayerNorm(VIT_DIM, eps=1e-6))
            self.weights, dim = f"{self.weights} + {source}", VIT_DIM
        else:
            layers = ResidualScoreEncoder(dim, depth, heads, mlp_ratio, carry=encoder == "residual")
        grid = self.image_size // 16
        self.detection_loss, self.duplicate_iou, self.max_faces = detection_loss, duplicate_iou, max_faces
        self.network = ResAttnViTNetwork(
            local,
            layers,
            self.num_classes,
            grid=grid,
            branches=branches,
            ema=ema,
            residual=residual,
            mad_p=mad_p,
            width=width,
            dim=dim,
            hidden=hidden,
            dropout=(conv_dropout, dropout),
        )
        self.backbone_lr = backbone_lr
        if self.detection:
            self.compiled_parts = ("network.backbone", "network.encoder")  # the step wants the tokens in between
            cells = grid if detection_grid is None else detection_grid
            if not 1 <= cells <= grid:
                raise UserError(f"model.detection_grid={detection_grid}: expected 1 to {grid} cells, or null")
            if isinstance(anchors, int):
                raise UserError(
                    f"model.anchors={anchors} shapes have to be found in data: expected them as [[width, height], ...]"
                )
            shapes = [[float(side) for side in shape] for shape in anchors]
            # Made last, so that with and without it all other weights begin the same.
            self.network.detection = DetectionHead(dim, hidden, self.num_classes, shapes, cells, self.image_size)

    @classmethod
    def from_data(cls, options: Mapping[str, Any], data: Any) -> dict[str, Any]:
        """The anchors, from the training part's faces.

        Raises:
            UserError: There are too few of them, or the test will show images in several views.
        """
        super().from_data(options, data)
        if not options["detection"] or not isinstance(options["anchors"], int):
            return {}
        sizes = torch.from_numpy(data.face_sizes("train"))
        try:
            shapes = anchor_shapes(sizes, options["anchors"])
        except ValueError:
            raise UserError(
                f"model.anchors={options['anchors']} shapes cannot be found among the {len(sizes)} face boxes of the "
                "training part: use data with more of them, fewer anchors, or model.detection=false"
            ) from None
        return {"anchors": [[round(side, 2) for side in shape] for shape in shapes.tolist()]}

    @property
    def cam_layer(self) -> nn.Module:
        """The fused map the transformer reads."""
        return self.network.conv

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """That of the image's label, or with detection that of its faces too."""
        if not self.detection:
            return super().loss(batch)
        head = self.network.detection
        assert head is not None
        known = KnownFaces.of(batch)
        logits, raw = self.network.forward_both(batch["image"])
        return self.detection_loss(head, raw, known) + self.single_loss(logits, batch, known.single), logits

    def find(self, image: Tensor) -> tuple[Tensor, list[Faces]]:
        """One pass for the image's logits and its faces."""
        head = self.network.detection
        assert head is not None
        logits, raw = self.network.forward_both(image)
        return logits, head.faces(raw, self.duplicate_iou, self.max_faces)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone at its own learning rate, the rest at the recipe's."""
        rest = [p for name, p in self.network.named_parameters() if not name.startswith("backbone.")]
        return [{"params": list(self.network.backbone.parameters()), "lr_scale": self.backbone_lr}, {"params": rest}]
