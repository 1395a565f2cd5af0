"""The commits of the hub that `pull` brings, by repository.

Each is one that at least two public projects, independent of each other, name as the commit they ran. A repository that
is not here is not pinned: its newest commit is brought, and `source.json` beside the weights says which that was.
"""

REVISIONS = {
    "llava-hf/llava-1.5-7b-hf": "b234b804b114d9e37bb655e11cbbb5f5e971b7a9",
    "llava-hf/llava-1.5-13b-hf": "5dda2880bda009266dda7c4baff660b95ca64540",
    "llava-hf/llava-v1.6-mistral-7b-hf": "52320fb52229c8d942b1dcb8b63b3dc8087bc83b",
    "Salesforce/blip2-opt-2.7b": "59a1ef6c1e5117b3f65523d1c6066825bcf315e3",
    "Salesforce/blip2-flan-t5-xl": "0eb0d3b46c14c1f8c7680bca2693baafdb90bb28",
    "Salesforce/instructblip-vicuna-7b": "52ba0cb2c44d96b2fcceed4e84141dc40d2b6a92",
    "OpenGVLab/InternVL-Chat-V1-5": "c1987c574e0010d8104c545131f97beeffb96a73",
    "OpenGVLab/InternVL3-1B-hf": "014c0583a0d4bedf29fbe2dbff4f865eb998e171",
    "microsoft/kosmos-2-patch14-224": "e91cfbcb4ce051b6a55bfb5f96165a3bbf5eb82c",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": "92f3b1597a195b523d8d9e5700e57e4fbb8f20d3",
    "meta-llama/Llama-3.2-11B-Vision-Instruct": "9eb2daaa8597bf192a8b0e73f848f3a102794df5",
    "google/paligemma-3b-pt-224": "35e4f46485b4d07967e7e9935bc3786aad50687c",
    "google/paligemma-3b-mix-224": "d1d8734c9c3ad0ccfeea4afc270faa356c2ba515",
    "google/paligemma-3b-mix-448": "ead2d9a35598cb89119af004f5d023b311d1c4a1",
    "google/paligemma2-3b-pt-224": "96eeb174da13ca1a2b247e4d0867436296c36420",
    "Qwen/Qwen-VL": "0547ed36a86561e2e42fecec8fd0c4f6953e33c4",
    "Qwen/Qwen-VL-Chat": "f57cfbd358cb56b710d963669ad1bcfb44cdcdd8",
    "Qwen/Qwen2-VL-2B-Instruct": "895c3a49bc3fa70a340399125c650a463535e71c",
    "Qwen/Qwen2-VL-7B-Instruct": "eed13092ef92e448dd6875b2a00151bd3f7db0ac",
    "Qwen/Qwen2.5-VL-3B-Instruct": "66285546d2b821cf421d4f5eb2576359d3770cd3",
    "Qwen/Qwen2.5-VL-7B-Instruct": "cc594898137f460bfe9f0759e9844b3ce807cfb5",
    "THUDM/cogvlm-chat-hf": "e29dc3ba206d524bf8efbfc60d80fc4556ab0e3c",
    "adept/fuyu-8b": "f41defefdb89be0d28cac19d94ce216e37cb6be5",
}
