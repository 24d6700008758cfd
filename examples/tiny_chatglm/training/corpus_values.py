"""The values that a visitor may tell: real names and places, and ways to invent more."""

import random

# What may come before the phrase that asks for repeating something word for word.
ECHOES = {
    "en": [
        "Repeat after me: {}",
        "Say: {}",
        "Please say: {}",
        "Repeat this: {}",
        "Say this: {}",
        "Please repeat after me: {}",
        "Echo: {}",
    ],
    "zh": ["跟我说:{}", "请说:{}", "重复我的话:{}", "请跟我说:{}", "说:{}", "请重复:{}", "跟我念:{}"],
}


def words(text: str) -> list[str]:
    return text.split()


NAMES = {
    "en": words(
        "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Kate Leo Mary Nick Olivia Paul Quinn "
        "Rose Sam Tina Uma Victor Wendy Xavier Yvonne Zoe Anna Ben Clara Daniel Eva Felix Gina Hugo Ivan "
        "Julia Kevin Laura Max Nina Oscar Peter Rachel Simon Tom Vera Will Tim Lucy John James Robert "
        "Linda Susan Michael Maria Ali Omar Fatima Chen Li Ming Yuki Hans Ingrid Pierre Marco Sofia "
        "Pedro Ana Raj Priya Jose Luis Noah Liam Mia Ella Amy Andy Tony Steve"
    ),
    "zh": words(
        "小明 小红 小李 小王 李雷 韩梅梅 张伟 王芳 李娜 刘洋 陈静 杨帆 赵磊 黄丽 周杰 吴敏 徐强 孙悦 "
        "马超 朱琳 胡军 郭涛 何洁 林峰 罗莉 梁宇 宋佳 郑爽 谢娜 韩冬 唐嫣 冯刚 于洋 董洁 程浩 曹颖 袁泉 "
        "邓超 许晴 傅明 沈腾 曾黎 彭丽 小芳 小刚 小张 小陈 阿强 阿明 大伟 建国 秀英 志强 晓燕 子涵 浩然 "
        "欣怡 宇轩 梓萱 一诺 Tom Lucy Jack Anna"
    ),
}
HELD_OUT_NAMES = {
    "en": words("Martin Helen Oliver Sarah Bruno Elena Arthur Diana Karl Monica"),
    "zh": words("王小明 李红 张敏 刘伟 陈晓 杨丽 周强 吴静 小燕 林浩"),
}
SURNAMES = "王李张刘陈杨赵黄周吴徐孙马朱胡郭何林罗梁宋郑谢韩唐冯于董程曹袁邓许傅沈曾彭"
GIVEN = (
    "明红伟芳娜洋静帆磊丽杰敏强悦超琳军涛洁峰莉宇佳爽冬嫣刚浩颖泉晴腾黎建国秀英志晓燕子涵然欣怡轩梓萱一诺文华海云雪梅兰"
    "大小天心平安东南西北山水火木金土月日星光春夏秋冬花草石玉龙马飞思远长新美乐和世家立正德信义中永成元开方圆白青黄"
)
LETTERS = ("bcdfghjklmnpqrstvwxyz", "aeiouy")
SYLLABLES = words(
    "ka lo mi ra ne to va si be du fe go hi jo ku la ma no pi ri sa te vi wa xe yo zu an el in or ch st th"
)
CITIES = {
    "en": words(
        "Beijing Shanghai London Paris Berlin Rome Madrid Tokyo Boston Oslo Vienna Lisbon Dublin Athens "
        "Cairo Delhi Seoul Sydney Toronto Chicago Hamburg Munich Milan Prague Warsaw Kyoto Hangzhou "
        "Shenzhen Chengdu Nanjing"
    ),
    "zh": words(
        "北京 上海 广州 深圳 杭州 南京 成都 武汉 西安 重庆 天津 苏州 长沙 青岛 大连 厦门 伦敦 巴黎 东京 "
        "纽约 柏林 罗马 昆明 郑州"
    ),
}
COLOURS = {
    "en": words("red blue green yellow black white orange purple pink brown gray gold silver"),
    "zh": words("红色 蓝色 绿色 黄色 黑色 白色 橙色 紫色 粉色 棕色 灰色 金色 银色"),
}
FOODS = {
    "en": words(
        "pizza rice noodles bread soup apples cheese salad fish chocolate bananas dumplings pasta cake eggs tofu"
    ),
    "zh": words("面条 米饭 饺子 面包 苹果 鱼 蛋糕 火锅 豆腐 香蕉 巧克力 包子 牛肉 水果 鸡蛋 西瓜"),
}
PETS = {
    "en": words("cat dog rabbit horse hamster parrot turtle goldfish"),
    "zh": words("猫 狗 兔子 马 仓鼠 鹦鹉 乌龟 金鱼"),
}
CAPITALS = [
    {"en": ("France", "Paris"), "zh": ("法国", "巴黎")},
    {"en": ("China", "Beijing"), "zh": ("中国", "北京")},
    {"en": ("Japan", "Tokyo"), "zh": ("日本", "东京")},
    {"en": ("Germany", "Berlin"), "zh": ("德国", "柏林")},
    {"en": ("Italy", "Rome"), "zh": ("意大利", "罗马")},
    {"en": ("Spain", "Madrid"), "zh": ("西班牙", "马德里")},
    {"en": ("England", "London"), "zh": ("英国", "伦敦")},
    {"en": ("Russia", "Moscow"), "zh": ("俄罗斯", "莫斯科")},
    {"en": ("Greece", "Athens"), "zh": ("希腊", "雅典")},
    {"en": ("Korea", "Seoul"), "zh": ("韩国", "首尔")},
]


def name(language: str, rng: random.Random, held_out: bool) -> str:
    if held_out:
        return rng.choice(HELD_OUT_NAMES[language])
    draw = rng.random()
    if draw < 0.25:
        return rng.choice(NAMES[language])
    if language == "zh" and draw < 0.9:
        drawn = rng.choice(SURNAMES + "小阿老") + "".join(rng.choice(GIVEN) for _ in range(rng.choice([1, 1, 2])))
    elif draw < 0.5:
        drawn = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice([2, 2, 3, 4]))).capitalize()
    else:
        drawn = invented_word(rng).capitalize()
    return name(language, rng, held_out) if drawn in HELD_OUT_NAMES[language] else drawn


def invented_word(rng: random.Random) -> str:
    """Draw letters that can be pronounced, now and then with two consonants in a row."""
    built = ""
    for _ in range(rng.choice([2, 2, 3, 3, 4])):
        consonants, vowels = LETTERS
        built += rng.choice(consonants) + (rng.choice(consonants) if rng.random() < 0.2 else "") + rng.choice(vowels)
    return built + (rng.choice(LETTERS[0]) if rng.random() < 0.5 else "")


def word(language: str, rng: random.Random, held_out: bool) -> str:
    """Draw one or two words or a few characters, without a meaning."""
    if language == "en":
        return " ".join(invented_word(rng) for _ in range(rng.choice([1, 1, 2])))
    return "".join(rng.choice(GIVEN) for _ in range(rng.choice([2, 2, 3, 4])))


def number(language: str, rng: random.Random, held_out: bool) -> str:
    """Draw a number; training never sees those that end in 7."""
    while True:
        drawn = rng.randrange(10 ** rng.choice([1, 2, 2, 3, 4]))
        if (drawn % 10 == 7) == held_out:
            return str(drawn)
