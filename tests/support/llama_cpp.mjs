// Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
// Greedy texts by llama.cpp: by the base, by the base with a draft model, by the draft model alone.
//
//   node llama_cpp.mjs BASE.gguf DRAFT.gguf REQUEST.json
//
// A request is {"prompts": [[ids], …], "tokens": n}. Prints a line of JSON per prompt: the new ids of each way, and how
// many drafted tokens were right and wrong.
import {readFileSync} from "node:fs";
import {DraftSequenceTokenPredictor, getLlama} from "node-llama-cpp";

const DRAFTED = 3;
const [basePath, draftPath, requestPath] = process.argv.slice(2);
const {prompts, tokens} = JSON.parse(readFileSync(requestPath, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const base = await llama.loadModel({modelPath: basePath});
const draft = await llama.loadModel({modelPath: draftPath});

async function greedy(model, ids, drafter) {
    const context = await model.createContext({contextSize: 512, threads: 1});
    const drafting = await drafter?.createContext({contextSize: 512, threads: 1});
    const options = {minTokens: DRAFTED, maxTokens: DRAFTED, minConfidence: 0};
    const tokenPredictor = drafting && new DraftSequenceTokenPredictor(drafting.getSequence(), options);
    const sequence = context.getSequence({tokenPredictor});
    const text = [];
    for await (const token of sequence.evaluate(ids, {temperature: 0})) {
        text.push(token);
        if (text.length >= tokens) break;
    }
    const {validated, refuted} = sequence.tokenPredictions;
    await context.dispose();
    await drafting?.dispose();
    return {text, validated, refuted};
}

for (const ids of prompts) {
    const alone = await greedy(base, ids);
    const drafted = await greedy(base, ids, draft);
    const own = await greedy(draft, ids);
    const {validated, refuted} = drafted;
    console.log(JSON.stringify({alone: alone.text, drafted: drafted.text, own: own.text, validated, refuted}));
}
